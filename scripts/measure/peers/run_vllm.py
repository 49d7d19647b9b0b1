# SPDX-License-Identifier: Apache-2.0
"""vLLM's CPU build, for `compare_peers`: `LLM.generate` of token ids.

Left to itself it takes a thread a physical core, less one for its scheduler, which of two cores is
one. Here it gets a thread on each core that this process may use, as the others do. What the
environment says of VLLM_CPU_OMP_THREADS_BIND and VLLM_CPU_KVCACHE_SPACE (GiB) wins.
"""

import os
from typing import Any

from jpaged.scripts.measure.peers.worker import serve


class Vllm:
    """See `worker.Peer`."""

    notes: list[str]

    def __init__(self, job: dict[str, Any]):
        affinity = getattr(os, "sched_getaffinity", lambda _: range(job["threads"]))
        defaults = {
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # which would add a process and its queues
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(affinity(0)))),
            "VLLM_NO_USAGE_STATS": "1",
            "HF_HUB_OFFLINE": "1",
        }
        os.environ.update(defaults | os.environ)  # before the import, which reads them
        import torch  # pyright: ignore[reportMissingImports]
        import vllm  # pyright: ignore[reportMissingImports]
        from vllm.platforms import current_platform  # pyright: ignore[reportMissingImports]

        self._vllm = vllm
        self._llm = vllm.LLM(
            job["model"],
            dtype=job["dtype"],
            skip_tokenizer_init=True,
            max_model_len=job["max_model_len"],
            max_num_seqs=job["rows"],
            disable_log_stats=True,
        )
        self.versions = {"vllm": vllm.__version__, "torch": torch.__version__}
        self.device, self.notes = current_platform.device_type, []

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        """See `worker.Peer`."""
        params = [
            self._vllm.SamplingParams(
                temperature=0.0, max_tokens=count, ignore_eos=True, detokenize=False
            )
            for count in output_lens
        ]
        inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
        found = self._llm.generate(inputs, params, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in found]


if __name__ == "__main__":
    serve(Vllm)
