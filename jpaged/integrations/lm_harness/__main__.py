# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness's command line, which knows the model "jpaged"."""

from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

import jpaged.integrations.lm_harness  # noqa: F401  # has the harness know it

cli_evaluate()
