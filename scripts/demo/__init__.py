# SPDX-License-Identifier: Apache-2.0
"""The shipped checkpoint: its corpus, its tokenizer, and its training."""
