# SPDX-License-Identifier: Apache-2.0
"""The programs that steps call: which there are, which ran before, how many were compiled."""

import collections
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp

from jpaged import pallas_kernels
from jpaged.device import sampling
from jpaged.device.burst import burst_function
from jpaged.device.compiler_options import compiler_options
from jpaged.host.batch import Batch
from jpaged.host.compile_plan import UnplannedProgramError
from jpaged.host.logprobs import likeliest_counts
from jpaged.models.inputs import PagedInputs
from jpaged.pallas_kernels import layout

logger = logging.getLogger(__name__)

# apply(params, inputs, kv_pages) -> (logits, kv_pages)
ApplyFn = Callable[[Any, PagedInputs, jax.Array], tuple[jax.Array, jax.Array]]


def step_function(apply: ApplyFn) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A step as it is compiled: tokens that the step before has sampled stand in the inputs."""

    def step(params, kv_pages, inputs, previous_slots, previous_tokens):
        # Slot -1 indexes the last sample, and is then not used.
        sampled = previous_tokens[previous_slots]
        token_ids = jnp.where(previous_slots < 0, inputs.token_ids, sampled)
        return apply(params, dataclasses.replace(inputs, token_ids=token_ids), kv_pages)

    return step


class Programs:
    """The jitted functions of a runner; each compiles once for every shape that it is called with.

    Attributes:
      decode_steps: most steps of a burst; with 1 there are none.
      ran: keys, as of `needed`, of those that ran before.
      step: `step_function`'s; the pool, its second argument, is donated.
      sample: (logits, rows) -> tokens i32[max_num_samples], and their log-probabilities.
      burst: `burst.burst_function`'s, likewise.
      process, model_logprobs: `sampling.process_logits` and `sampling.model_logprobs`.
      target_logprobs, drawn_logprobs: those of `sampling`.
      top_logprobs, beam_candidates, processed_beam_candidates: those of `sampling`.
      copy_pages, get_pages, set_pages: of a pool, which the first and the last are donated.
    """

    def __init__(
        self,
        apply: ApplyFn,
        *,
        max_num_samples: int,
        vocab_size: int,
        backend: str,
        decode_steps: int = 1,
    ):
        """Compiles nothing yet; see `runner.ModelRunner`, which has the same arguments."""
        # By thread, each of which adds to its own.
        self._compilations: collections.Counter[int] = collections.Counter()
        self.ran: set[Hashable] = set()
        self.decode_steps = decode_steps
        self._vocab_size = vocab_size

        def sample(logits, rows):
            tokens, logprobs = sampling.sample(logits, rows)
            logprobs = sampling.mark_not_finite(logits, logprobs)
            # Padded to one length, so that the next step does not depend on this step's shape.
            return jnp.pad(tokens, (0, max_num_samples - tokens.shape[0])), logprobs

        copy_pages = functools.partial(pallas_kernels.copy_pages, backend=backend)
        options = compiler_options(jax.local_devices()[0].platform)
        self.step = self._jit(
            "step", step_function(apply), donate_argnums=1, compiler_options=options
        )
        self.sample = self._jit("sample", sample, compiler_options=options)
        self.burst = self._jit(
            "burst",
            burst_function(apply, decode_steps, max_num_samples),
            donate_argnums=1,
            compiler_options=options,
        )
        self.process = self._jit("process_logits", sampling.process_logits)
        self.model_logprobs = self._jit("model_logprobs", sampling.model_logprobs)
        self.target_logprobs = self._jit("target_logprobs", sampling.target_logprobs)
        self.drawn_logprobs = self._jit("drawn_logprobs", sampling.drawn_logprobs, static_argnums=4)
        self.top_logprobs = self._jit("top_logprobs", sampling.top_logprobs, static_argnums=1)
        self.beam_candidates = self._jit(
            "beam_candidates", sampling.beam_candidates, static_argnums=3
        )
        self.processed_beam_candidates = self._jit(
            "processed_beam_candidates", sampling.processed_beam_candidates, static_argnums=5
        )
        self.copy_pages = self._jit("copy_pages", copy_pages, donate_argnums=0)
        self.get_pages = self._jit("get_pages", layout.take_pages)
        self.set_pages = self._jit("set_pages", layout.put_pages, donate_argnums=0)

    @property
    def num_compilations(self) -> int:
        """Programs compiled so far."""
        return sum(list(self._compilations.values()))

    @property
    def num_compiled_here(self) -> int:
        """Those of them that this thread compiled, and not one that is ahead of it."""
        return self._compilations[threading.get_ident()]

    def num_likeliest(self, num_logprobs: int) -> int:
        """As many as programs report, of which there are few: see `likeliest_counts`."""
        return likeliest_counts(num_logprobs, self._vocab_size)[-1]

    def check_planned(self, batch: Batch) -> None:
        """Raises UnplannedProgramError if something that a batch needs did not run before."""
        missing = self.needed(batch) - self.ran
        if not missing:
            return
        live = f"{int(batch.cu_q_lens[-1])} tokens of {int(batch.num_seqs[0])} sequences"
        if batch.shape in missing:
            reason = f"{batch.shape}, tokens x rows, is not compiled; add it to step_shapes"
        else:
            # Requests that ask for more than was planned are refused when they are added.
            reason = (
                f"what was planned for {batch.shape}, tokens x rows, lacks "
                f"{sorted(map(str, missing))}, a fault of jpaged; please report it"
            )
        raise UnplannedProgramError(
            f"strict_shapes: a step of {live}: {reason}, or do without strict_shapes"
        )

    def needed(self, batch: Batch) -> set[Hashable]:
        """What is called for a batch, as keys; the step and the sampler have the same."""
        if batch.burst is not None:
            return {(batch.shape, "burst")}
        rows, processors = batch.shape.num_rows, batch.processors
        needed: set[Hashable] = {batch.shape}
        if batch.num_logprobs:
            needed.add((rows, self.num_likeliest(batch.num_logprobs)))
        if batch.modes is not None:
            needed.add((rows, "modes", self.num_likeliest(batch.modes.count)))
        if batch.scores is not None:
            needed.add((rows, "scores"))
        width = None
        if processors is not None:
            width = processors.width
            needed.add((rows, "processors", width))
        needed.update(
            (rows, len(beam.slots), beam.num_candidates, width if beam.processed else None)
            for beam in batch.beams
        )
        return needed

    def _jit(self, name: str, function: Callable, **options: Any) -> Callable:
        """Counts the traces of a function, each of which jit follows with a compilation."""

        def traced(*args, **kwargs):
            self._compilations[threading.get_ident()] += 1
            shapes = [
                f"{leaf.dtype}{list(leaf.shape)}"
                for leaf in jax.tree.leaves((args[1:], kwargs))
                if hasattr(leaf, "shape")
            ]
            logger.debug("compiling %s for %s", name, " ".join(shapes))
            return function(*args, **kwargs)

        traced.__name__ = name  # what traces and dumps call the program
        return jax.jit(traced, **options)
