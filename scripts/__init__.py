# SPDX-License-Identifier: Apache-2.0
"""Programs: flags in, one library call, results out."""
