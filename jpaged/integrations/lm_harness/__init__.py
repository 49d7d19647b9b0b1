# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness: the model "jpaged", which answers its tasks with an engine.

    python -m jpaged.integrations.lm_harness --model jpaged --model_args model=DIR --tasks arc_easy

The harness knows models that are not its own only when they have been imported, so this is its
command line with one model more. In Python it is `lm_eval.simple_evaluate(model=JpagedLM(...))`;
after `import jpaged.integrations.lm_harness` also `simple_evaluate(model="jpaged", ...)`.
"""

try:
    # The harness's own models first: it does not look for them once it has others.
    import lm_eval.models  # noqa: F401  # pyright: ignore[reportMissingImports]
except ImportError as e:
    raise ImportError(
        f"jpaged.integrations.lm_harness needs lm-evaluation-harness ({e}): pip install "
        "'jpaged[lm-eval]'"
    ) from e

from jpaged.integrations.lm_harness.model import JpagedLM

__all__ = ["JpagedLM"]
