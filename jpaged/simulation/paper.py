# SPDX-License-Identifier: Apache-2.0
"""The setup of Kwon et al. 2023, OPT-13B on an A100, and what the paper says that it gave."""

from typing import Any

from jpaged.host.admission import SchedulerConfig
from jpaged.simulation.costs import CostModel

COSTS = CostModel()
# The 12 GiB that the paper leaves for keys and values, in tokens of 800 KiB: its 15.7 thousand.
NUM_SLOTS = 15_728
BUDGETS = SchedulerConfig(
    max_num_batched_tokens=2560, max_num_seqs=512, max_model_len=2048, prefix_cache=False
)
VOCAB_SIZE = 50_272
# Requests a second, by the name of their lengths.
LOADS = {"sharegpt": 2.0, "alpaca": 30.0}

# What the paper has, under the names that our figures have in docs/paper_figures/figures.json;
# percentages as shares.
PAPER: dict[str, Any] = {
    "live": {
        "contiguous-max": 0.204,
        "contiguous-pow2": 0.268,
        "contiguous-oracle": 0.382,
        "paged": 0.963,
    },
    "running": {
        "sharegpt": {
            "contiguous-max": 7.00,
            "contiguous-pow2": 9.81,
            "contiguous-oracle": 13.62,
            "paged": 30.42,
        },
        "alpaca": {
            "contiguous-max": 7.00,
            "contiguous-pow2": 43.24,
            "contiguous-oracle": 72.75,
            "paged": 132.44,
        },
    },
    # Of ShareGPT the paper's text has the ends of the range alone.
    "sampling": {
        "alpaca": {"2": 0.0609, "4": 0.0853, "6": 0.0979},
        "sharegpt": {"2": 0.162, "6": 0.305},
    },
    "beams": {
        "alpaca": {"2": 0.3756, "4": 0.5313, "6": 0.5516},
        "sharegpt": {"2": 0.443, "6": 0.663},
    },
}
