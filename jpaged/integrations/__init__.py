# SPDX-License-Identifier: Apache-2.0
"""jpaged inside other systems, which are imported only where they are used; each is an extra."""
