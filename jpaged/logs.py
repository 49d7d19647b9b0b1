# SPDX-License-Identifier: Apache-2.0
"""What an engine writes down of its steps: all, to run them again; some, to be looked at."""

from jpaged.device.memory import PoolPlan
from jpaged.host.admission import SchedulerConfig
from jpaged.host.config import EngineConfig
from jpaged.host.step_log import StepLog, open_log
from jpaged.telemetry.recorder import Recorder, open_recorder


def open_logs(
    config: EngineConfig, scheduler_config: SchedulerConfig, plan: PoolPlan
) -> tuple[StepLog | None, Recorder | None]:
    """Begins the files that `record_steps` and `record` name; None where they name none.

    Raises:
      ValueError: if one cannot be written.
    """
    log = open_log(
        config.record_steps,
        scheduler_config,
        plan.num_pages,
        config.page_size,
        deterministic=config.deterministic,
        num_groups=plan.num_groups,
    )
    recorder = open_recorder(
        config.record,
        page_size=config.page_size,
        num_pages=plan.num_pages,
        kinds=plan.kinds,
        max_model_len=plan.max_model_len,
    )
    return log, recorder
