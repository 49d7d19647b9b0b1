# SPDX-License-Identifier: Apache-2.0
"""What a run tells of itself: a line a minute, metrics, and a record of its pages to look at."""
