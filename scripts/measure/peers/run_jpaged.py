# SPDX-License-Identifier: Apache-2.0
"""jpaged, for `compare_peers`: `Engine.generate`; `options` are fields of `EngineConfig`."""

from typing import Any

from jpaged.scripts.measure.peers.worker import serve


class Jpaged:
    """See `worker.Peer`."""

    notes: list[str]

    def __init__(self, job: dict[str, Any]):
        from jpaged.engine import Engine
        from jpaged.host.config import EngineConfig
        from jpaged.measure import machine

        self._engine = Engine.load(job["model"], EngineConfig(**job["options"]))
        self.versions, self.notes = machine.versions(), []
        self.device = machine.hardware()["device"]

    def generate(self, prompts: list[list[int]], output_lens: list[int]) -> list[list[int]]:
        """See `worker.Peer`."""
        from jpaged.host.params import SamplingParams

        params = [
            SamplingParams(max_tokens=count, temperature=0.0, ignore_eos=True)
            for count in output_lens
        ]
        return [list(out.outputs[0].token_ids) for out in self._engine.generate(prompts, params)]


if __name__ == "__main__":
    serve(Jpaged)
