# SPDX-License-Identifier: Apache-2.0
"""Measurements of the runtime, alone and beside others."""
