# SPDX-License-Identifier: Apache-2.0
"""Measures engines: what starting and serving take, and on which machine."""
