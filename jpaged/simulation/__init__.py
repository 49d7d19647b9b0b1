# SPDX-License-Identifier: Apache-2.0
"""Serving without a device: requests, a cost model, and what paging is compared with."""
