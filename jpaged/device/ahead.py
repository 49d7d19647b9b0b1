# SPDX-License-Identifier: Apache-2.0
"""Compiles a runner's programs before there are weights, a pool, or a step to run."""

import time
from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.device.memory import PoolPlan
from jpaged.device.programs import Programs
from jpaged.device.runner import SWAP_PAGES, inputs_of, zeros
from jpaged.host.batch import StepShape, empty_batch
from jpaged.host.burst import idle_burst
from jpaged.host.logits_processors import idle_rows
from jpaged.host.logprobs import idle_modes
from jpaged.host.score_batch import idle_scores
from jpaged.host.warm_up import WarmUpPlan, idle_beams
from jpaged.models.sharding import placements


class AheadCompiler:
    """Compiles programs for arguments of which only shapes, dtypes and places are known.

    They are those that a `ModelRunner` passes: what is compiled here is found by its calls, in this
    process by jax's own cache of what it lowered, and in later ones in the persistent cache.

    Attributes:
      programs: what is compiled.
    """

    def __init__(self, programs: Programs, params: Any, plan: PoolPlan, *, max_num_samples: int):
        """Compiles nothing yet.

        Args:
          programs: of the runner that will call them.
          params: a tree of `jax.ShapeDtypeStruct`s, stacked as the runner's are.
          plan: the pool's dimensions.
          max_num_samples: most samples a step takes.
        """
        self.programs = programs
        self._plan, self._max_num_samples = plan, max_num_samples
        self._where = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where = placements(params, self._where)
        self._params = jax.tree.map(self._placed, params, where)
        self._kv_pages = self._struct(plan.shape, plan.dtype)
        self._tokens = self._struct((max_num_samples,), jnp.int32)
        self._lowered: dict[Hashable, jax.stages.Lowered] = {}

    def lower_step(self, shape: StepShape, plan: WarmUpPlan) -> Iterator[jax.stages.Lowered]:
        """Traces what steps of a shape call; each may be compiled in any thread.

        What several shapes call is the same object for all.

        Args:
          shape: the shape.
          plan: what else is wanted of it, as in `ModelRunner.warm_up`.

        Raises:
          Exception: whatever the compiler has to say.
        """
        programs = self.programs
        batch = empty_batch(shape, self._plan.pages_per_seq, 0, self._plan.num_groups)
        yield (lowered := self._lower(
            programs.step, self._params, self._kv_pages, inputs_of(batch), batch.previous_slots,
            self._tokens,
        ))  # fmt: skip
        logits, _ = self._outputs(lowered)
        yield (lowered := self._lower(programs.sample, logits, batch.sampling))
        tokens, logprobs = self._outputs(lowered)
        if programs.decode_steps > 1 and shape in plan.bursts:
            yield self._lower(
                programs.burst, self._params, self._kv_pages, inputs_of(batch),
                batch.previous_slots, self._tokens, batch.sampling,
                idle_burst(shape.num_rows).rows,
            )  # fmt: skip
        for count in plan.likeliest:
            yield self._lower(programs.top_logprobs, logits, count)
        if plan.scores:
            targets = idle_scores(shape.num_rows).targets
            yield self._lower(programs.target_logprobs, logits, targets)
        for count in plan.modes:
            filtered = idle_modes(shape.num_rows, count).filtered
            yield self._lower(
                programs.drawn_logprobs, logits, tokens, batch.sampling, filtered, count
            )
        beams = [idle_beams(*search) for search in plan.beams]
        for beam in beams:
            yield self._lower(
                programs.beam_candidates, logits, beam.slots, beam.scores, beam.num_candidates
            )
        for width in plan.processors:
            rows = idle_rows(shape.num_rows, -(-logits.shape[-1] // 8), width)
            yield self._lower(programs.process, logits, rows, tokens)
            yield self._lower(programs.model_logprobs, logits, tokens, logprobs, rows)
            for beam in beams:
                yield self._lower(
                    programs.processed_beam_candidates, logits, beam.slots, beam.scores, rows,
                    tokens, beam.num_candidates,
                )  # fmt: skip

    def compile_rest(self, *, swaps: bool) -> float:
        """Compiles what no step's shape changes; returns the seconds that it took.

        Args:
          swaps: whether pages are also copied to host memory and back.
        """
        start, programs = time.perf_counter(), self.programs
        for struct in (self._kv_pages, self._tokens):
            zeros.lower(struct.shape, np.dtype(struct.dtype)).compile()
        most = self._max_num_samples * self._plan.num_groups
        for exponent in range((most - 1).bit_length() + 1):
            ids = np.zeros(2**exponent, np.int32)
            self._compile(programs.copy_pages, self._kv_pages, ids, ids)
        if swaps:
            ids = np.zeros(SWAP_PAGES * self._plan.num_groups, np.int32)
            pages = self._compile(programs.get_pages, self._kv_pages, ids)
            # From the host, so where they lie is not said.
            pages = jax.ShapeDtypeStruct(pages.shape, pages.dtype)
            self._compile(programs.set_pages, self._kv_pages, ids, pages)
        return time.perf_counter() - start

    def _compile(self, program: Any, *arguments: Any) -> Any:
        """Compiles a program, and says what it returns."""
        lowered = self._lower(program, *arguments)
        lowered.compile()
        return self._outputs(lowered)

    def _lower(self, program: Any, *arguments: Any) -> jax.stages.Lowered:
        leaves, tree = jax.tree.flatten(arguments)
        shapes = (jax.typeof(x) if hasattr(x, "shape") else x for x in leaves)
        key = program, tree, tuple(shapes)
        if key not in self._lowered:
            self._lowered[key] = program.lower(*arguments)
        return self._lowered[key]

    def _outputs(self, lowered: jax.stages.Lowered) -> Any:
        return jax.tree.map(lambda out: self._struct(out.shape, out.dtype), lowered.out_info)

    def _struct(self, shape: Sequence[int], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._where)

    def _placed(self, struct: jax.ShapeDtypeStruct, where: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=where)
