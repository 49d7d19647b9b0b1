# SPDX-License-Identifier: Apache-2.0
"""transformers, for `compare_peers`; `options` have `mode` and `max_batch_tokens`.

* `eager`: `generate` with a cache that grows; `static`: with a static one, for which transformers
  compiles the model on GPUs. Either takes as many requests at once as there are rows, in order of
  arrival, and its batch ends with the longest of them: prompts are padded on the left, and what
  is generated beyond a request's length is thrown away.
* `batch`: continuous batching over pages, which is what `generate_batch` runs; its manager is
  kept, and takes a length for each request.
"""

from typing import Any

from jpaged.scripts.measure.peers.worker import serve

_PAD = 0
_WAIT_S = 1.0


class Transformers:
    """See `worker.Peer`."""

    notes: list[str]

    def __init__(self, job: dict[str, Any]):
        import torch  # pyright: ignore[reportMissingImports]
        import transformers  # pyright: ignore[reportMissingImports]

        self._torch, self._rows = torch, job["rows"]
        self._mode = job["options"]["mode"]
        torch.set_num_threads(job["threads"])
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = getattr(torch, job["dtype"])
        self._model = transformers.AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=dtype, local_files_only=True
        ).to(self.device)
        self._model.eval()
        self.versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.notes = []
        if self._mode != "batch":
            self.notes.append(
                f"static batches of {self._rows} in order of arrival, each as long as its longest"
            )
            return
        length = transformers.ContinuousBatchingConfig.page_size
        config = transformers.ContinuousBatchingConfig(
            # A page more each: those that are computed while another one ends.
            num_blocks=self._rows * (-(-job["max_model_len"] // length) + 1),
            max_requests_per_batch=self._rows,
            max_batch_tokens=job["options"]["max_batch_tokens"],
        )
        generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1)
        self._manager = self._model.init_continuous_batching(generation, config)
        self._manager.start()

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        """See `worker.Peer`."""
        if self._mode == "batch":
            return self._continuously(prompts, output_lens)
        found = []
        for first in range(0, len(prompts), self._rows):
            batch = slice(first, first + self._rows)
            found += self._statically(prompts[batch], output_lens[batch])
        return found

    def _statically(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        torch, longest = self._torch, max(map(len, prompts))
        ids = [[_PAD] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        options = {"cache_implementation": "static"} if self._mode == "static" else {}
        with torch.inference_mode():
            out = self._model.generate(
                torch.tensor(ids, device=self.device),
                attention_mask=torch.tensor(mask, device=self.device),
                do_sample=False,
                min_new_tokens=max(output_lens),
                max_new_tokens=max(output_lens),
                eos_token_id=None,
                pad_token_id=_PAD,
                **options,
            )
        rows = zip(out[:, longest:].tolist(), output_lens, strict=True)
        return [row[:count] for row, count in rows]

    def _continuously(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        ids = [
            self._manager.add_request(prompt, max_new_tokens=count)
            for prompt, count in zip(prompts, output_lens, strict=True)
        ]
        found = {}
        while len(found) < len(ids):
            result = self._manager.get_result(timeout=_WAIT_S)
            if result is not None and result.error is not None:
                raise RuntimeError(f"request {result.request_id} failed: {result.error}")
            if result is not None and result.is_finished():
                found[result.request_id] = list(result.generated_tokens)
            elif result is None and not self._manager.is_running():
                raise RuntimeError("its thread of continuous batching has ended")
        return [found[request_id] for request_id in ids]


if __name__ == "__main__":
    serve(Transformers)
