# SPDX-License-Identifier: Apache-2.0
"""Peers in processes of their own, a file each, for `scripts.measure.compare_peers`."""
