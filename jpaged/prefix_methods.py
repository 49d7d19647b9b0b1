# SPDX-License-Identifier: Apache-2.0
"""What an engine does with pages that are kept for what they hold: in memory, and on disk."""

import logging
import time

from jpaged.device.fingerprint import context_of
from jpaged.device.memory import PoolPlan
from jpaged.device.runner import ModelRunner
from jpaged.host.config import EngineConfig
from jpaged.host.page_files import PageFiles
from jpaged.host.prompt_cache import PromptCache
from jpaged.live import LiveRequests
from jpaged.models.config import ModelConfig

logger = logging.getLogger(__name__)


class PrefixMethods:
    """Forgets pages, or saves them, for who has requests that leave them."""

    _live: LiveRequests
    _prompts: PromptCache | None

    def reset_prefix_cache(self) -> None:
        """Forgets all pages that are kept for their content, for instance after new weights.

        Those on disk stay, for who has the weights that they are of.

        Raises:
          RuntimeError: if requests are live that use such pages.
        """
        self._live.enter()
        cache = self._live.pipeline.scheduler.cache
        cache.check_unused()
        with self._live.change:
            cache.clear()
            if self._prompts is not None:
                self._prompts.reset()

    def save_prompts(self) -> None:
        """Writes the newest long prompts that memory still has to `EngineConfig.prompt_cache`.

        For the end of a run: also those that one request alone began with. What several did is
        written each time that no request is live any more, in a thread, which Python waits for
        before it ends. Without a prompt cache nothing happens.

        Raises:
          RuntimeError: if requests are live.
        """
        self._live.enter()
        if self._prompts is None:
            return
        if self._live.by_id:
            raise RuntimeError(
                f"{len(self._live.by_id)} requests are live: save when they have ended"
            )
        self._prompts.flush()
        with self._live.change:
            self._live.pipeline.save_prompts(at_end=True)
        self._prompts.flush()


def open_prompt_cache(
    config: EngineConfig,
    model_config: ModelConfig,
    plan: PoolPlan,
    runner: ModelRunner,
    backend: str,
) -> PromptCache | None:
    """Opens what `config.prompt_cache` names; None where it names nothing.

    Raises:
      ValueError: if the directory cannot be made or read.
    """
    if config.prompt_cache is None:
        return None
    files = PageFiles(config.prompt_cache, config.prompt_cache_bytes)

    def context() -> bytes:
        start = time.perf_counter()
        found = context_of(
            config,
            model_config,
            plan,
            runner.params,
            backend=backend,
        )
        took_s = time.perf_counter() - start
        logger.info("prompt cache %s: %s (%.2f s)", files.path, found.hex()[:12], took_s)
        return found

    return PromptCache(
        files,
        plan.kinds,
        page_size=config.page_size,
        page_bytes=plan.page_bytes,
        min_pages=config.prompt_cache_min_pages,
        context=context,
    )
