# SPDX-License-Identifier: Apache-2.0
"""llama.cpp, for `compare_peers`, over llama-cpp-python's binding of its C interface.

The binding's own class runs one sequence at a time. This has continuous batching as llama-server
does it: a batch holds a token of each sequence that runs, then prompts of those that wait while it
has room, cut where it ends; a sequence that ends leaves its place to the next at once.
"""

import ctypes
from typing import Any

from jpaged.scripts.measure.peers.worker import serve

_BATCH_TOKENS = 2048  # llama-server's default


class Llama:
    """See `worker.Peer`."""

    notes: list[str]

    def __init__(self, job: dict[str, Any]):
        import llama_cpp  # pyright: ignore[reportMissingImports]

        self._lib, self._rows = llama_cpp, job["rows"]
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(job["gguf"].encode(), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {job['gguf']}")
        params = llama_cpp.llama_context_default_params()
        params.n_seq_max = self._rows
        # Each sequence has a part of its own, which holds whole blocks of 256 tokens.
        params.n_ctx = self._rows * -(-job["max_model_len"] // 256) * 256
        params.kv_unified = False
        params.n_batch = _BATCH_TOKENS
        params.n_threads = params.n_threads_batch = job["threads"]
        params.no_perf = True
        if job["dtype"] == "float32":
            params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
        self._context = llama_cpp.llama_init_from_model(self._model, params)
        if not self._context:
            raise RuntimeError(f"llama.cpp has no room for {params.n_ctx} tokens")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._batch = llama_cpp.llama_batch_init(_BATCH_TOKENS, 0, 1)
        vocab = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
        self.versions = {"llama-cpp-python": llama_cpp.__version__}
        self.device = "gpu" if llama_cpp.llama_supports_gpu_offload() else "cpu"
        self.notes = [] if job["dtype"] == "float32" else ["keys and values are float16"]

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        """See `worker.Peer`."""
        found: list[list[int]] = [[] for _ in prompts]
        waiting, running = list(range(len(prompts)))[::-1], {}  # request by row
        read = [0] * len(prompts)  # tokens of each prompt that were in a batch
        while waiting or running:
            for row in range(self._rows):
                if waiting and row not in running:
                    running[row] = waiting.pop()
            self._batch.n_tokens = 0
            asked = []  # rows whose next token this batch gives
            for row, request in running.items():
                if found[request]:
                    position = len(prompts[request]) + len(found[request]) - 1
                    self._add(row, position, found[request][-1], last=True)
                    asked.append(row)
            for row, request in running.items():
                prompt = prompts[request]
                while read[request] < len(prompt) and self._batch.n_tokens < _BATCH_TOKENS:
                    position = read[request]
                    read[request] += 1
                    last = read[request] == len(prompt)
                    self._add(row, position, prompt[position], last=last)
                    if last:
                        asked.append(row)
            for row, token in zip(asked, self._decode(len(asked)), strict=True):
                request = running[row]
                found[request].append(token)
                if len(found[request]) == output_lens[request]:
                    self._lib.llama_memory_seq_rm(self._memory, row, -1, -1)
                    del running[row]
        return found

    def _add(self, row: int, position: int, token: int, *, last: bool) -> None:
        batch, index = self._batch, self._batch.n_tokens
        batch.token[index], batch.pos[index] = token, position
        batch.n_seq_id[index], batch.seq_id[index][0] = 1, row
        batch.logits[index] = last
        batch.n_tokens += 1

    def _decode(self, count: int) -> list[int]:
        """Runs the batch; the likeliest token of each of its `count` outputs, in its order."""
        import numpy as np

        code = self._lib.llama_decode(self._context, self._batch)
        if code:
            raise RuntimeError(f"llama_decode gave {code} for {self._batch.n_tokens} tokens")
        if not count:
            return []
        floats = self._lib.llama_get_logits(self._context)
        floats = ctypes.cast(floats, ctypes.POINTER(ctypes.c_float))
        logits = np.ctypeslib.as_array(floats, (count, self._vocab_size))
        return logits.argmax(axis=1).tolist()


if __name__ == "__main__":
    serve(Llama)
