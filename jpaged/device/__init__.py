# SPDX-License-Identifier: Apache-2.0
"""What owns device arrays: the page pool, the jitted step, and how large and fast they are."""
