# SPDX-License-Identifier: Apache-2.0
"""Decoder models as pure functions of a parameter pytree and a paged KV cache."""
