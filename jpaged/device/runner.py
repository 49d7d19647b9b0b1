# SPDX-License-Identifier: Apache-2.0
"""Runs steps on the device: owns the page pool, donates it to every step, counts compilations."""

import dataclasses
import functools
import logging
import math
import time
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import pallas_kernels
from jpaged.device import sampling
from jpaged.device.host_pages import HostPages
from jpaged.device.memory import PoolPlan
from jpaged.host.batch import Batch, BeamBatch, StepShape, empty_batch
from jpaged.host.growth.base import Candidate, Outcome
from jpaged.host.logits_processors import idle_rows
from jpaged.models.inputs import PagedInputs
from jpaged.models.sharding import placements
from jpaged.pallas_kernels import layout
from jpaged.pallas_kernels.rows import Rows

logger = logging.getLogger(__name__)

# Pages of a group that are swapped by one program, so that there is one for any number.
_SWAP_PAGES = 16

# apply(params, inputs, kv_pages) -> (logits, kv_pages)
ApplyFn = Callable[[Any, PagedInputs, jax.Array], tuple[jax.Array, jax.Array]]


@dataclasses.dataclass(frozen=True)
class StepResult:
    """One step's samples, still on the device until they are read.

    Attributes:
      tokens: i32[max_num_seqs], the first `num_samples` live.
      logprobs: f32[num_rows], of the tokens; NaN where the logits are not finite.
      top: i32 and f32[num_rows, count] likeliest tokens and their log-probabilities, or None.
      beams: for each beam search of the step, what `sampling.beam_candidates`, or
        `processed_beam_candidates`, returned.
      num_samples: live samples.
      compile_s: seconds that compiling took before the step was on its way; 0 mostly.
    """

    tokens: jax.Array
    logprobs: jax.Array
    top: tuple[jax.Array, jax.Array] | None
    beams: list[tuple[jax.Array, ...]]
    num_samples: int
    compile_s: float = 0.0

    def read(self) -> Outcome:
        """Waits for the step and returns what it found."""
        tokens = np.asarray(self.tokens)[: self.num_samples].tolist()
        logprobs = np.asarray(self.logprobs)[: self.num_samples].tolist()
        likeliest = None
        if self.top is not None:
            ids, values = (np.asarray(part)[: self.num_samples].tolist() for part in self.top)
            pairs = zip(ids, values, strict=True)
            likeliest = [dict(zip(*pair, strict=True)) for pair in pairs]
        candidates = []
        for parts in self.beams:
            found = zip(*(np.asarray(part).tolist() for part in parts), strict=True)
            candidates.append([Candidate(*each) for each in found if each[0] > -math.inf])
        return Outcome(tokens, logprobs, likeliest, candidates)


def step_function(apply: ApplyFn) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """A step as it is compiled: tokens that the step before has sampled stand in the inputs."""

    def step(params, kv_pages, inputs, previous_slots, previous_tokens):
        # Slot -1 indexes the last sample, and is then not used.
        sampled = previous_tokens[previous_slots]
        token_ids = jnp.where(previous_slots < 0, inputs.token_ids, sampled)
        return apply(params, dataclasses.replace(inputs, token_ids=token_ids), kv_pages)

    return step


class ModelRunner:
    """The device side of an engine, and the only owner of the page pool.

    Steps are dispatched in order and run in order, so a page that the host has given to another
    sequence is written only after the steps that read it.

    Attributes:
      num_compilations: programs compiled so far.
      num_unplanned_compilations: those of them after `warm_up`; each is logged with its shape.
    """

    def __init__(
        self,
        apply: ApplyFn,
        params: Any,
        plan: PoolPlan,
        *,
        max_num_samples: int,
        vocab_size: int,
        backend: str,
        num_host_pages: int = 0,
    ):
        """Allocates the pool.

        Args:
          apply: the model as a pure function.
          params: its parameters; replace the attribute between steps to swap weights.
          plan: the pool's dimensions.
          max_num_samples: most samples a step takes.
          vocab_size: of the logits.
          backend: which kernels copy pages.
          num_host_pages: pages that host memory has room for.
        """
        # All on one device by name: jit compiles anew, without a trace, when an argument goes from
        # a default placement to the one that an earlier step's result has.
        device = jax.devices()[0]
        where = placements(params, jax.sharding.SingleDeviceSharding(device))
        self.params = jax.device_put(params, where)
        self.num_compilations = 0
        self.num_unplanned_compilations = 0
        self._warm = False
        self._programs_run: set[Hashable] = set()
        self._plan = plan
        self._swap_pages = _SWAP_PAGES * plan.num_groups
        self._vocab_size = vocab_size
        self._max_num_samples = max_num_samples
        self._device = device
        self._kv_pages, self._tokens = self._new_pages(), self._new_tokens()
        self._host_pages = HostPages(num_host_pages, plan)

        def sample(logits, rows):
            tokens, logprobs = sampling.sample(logits, rows)
            logprobs = sampling.mark_not_finite(logits, logprobs)
            # Padded to one length, so that the next step does not depend on this step's shape.
            return jnp.pad(tokens, (0, max_num_samples - tokens.shape[0])), logprobs

        copy_pages = functools.partial(pallas_kernels.copy_pages, backend=backend)
        self._step = jax.jit(self._counted("step", step_function(apply)), donate_argnums=1)
        self._sample = jax.jit(self._counted("sample", sample))
        self._copy_pages = jax.jit(self._counted("copy_pages", copy_pages), donate_argnums=0)
        self._top_logprobs = jax.jit(
            self._counted("top_logprobs", sampling.top_logprobs), static_argnums=1
        )
        self._beam_candidates = jax.jit(
            self._counted("beam_candidates", sampling.beam_candidates), static_argnums=3
        )
        self._process = jax.jit(self._counted("process_logits", sampling.process_logits))
        self._model_logprobs = jax.jit(self._counted("model_logprobs", sampling.model_logprobs))
        self._processed_beam_candidates = jax.jit(
            self._counted("processed_beam_candidates", sampling.processed_beam_candidates),
            static_argnums=5,
        )
        self._get_pages = jax.jit(self._counted("get_pages", layout.take_pages))
        self._set_pages = jax.jit(self._counted("set_pages", layout.put_pages), donate_argnums=0)

    def is_compiled(self, batch: Batch) -> bool:
        """Whether `run` would start at once: all that it calls ran before, but for page copies."""
        return self._programs_run.issuperset(self._programs(batch))

    def run(self, batch: Batch, copies: Iterable[tuple[int, int]] = ()) -> StepResult:
        """Dispatches a step and returns without waiting for it.

        Args:
          batch: what to compute.
          copies: `(src, dst)` pages to copy first.

        Returns:
          The samples, to be read when they are needed.
        """
        start, compiled = time.perf_counter(), self.num_compilations
        waited_s = 0.0
        if copies := list(copies):
            self._kv_pages = self._copy_pages(self._kv_pages, *_pad_copies(copies))
        logits, self._kv_pages = self._step(
            self.params, self._kv_pages, inputs_of(batch), batch.previous_slots, self._tokens
        )
        if not self.is_compiled(batch):
            # What is compiled next would hide what the step takes, and compete with it.
            ready = time.perf_counter()
            jax.block_until_ready(logits)
            waited_s = time.perf_counter() - ready
        processors, previous, chosen_from = batch.processors, self._tokens, logits
        if processors is not None:
            chosen_from = self._process(logits, processors, previous)
        self._tokens, logprobs = self._sample(chosen_from, batch.sampling)
        if processors is not None:
            logprobs = self._model_logprobs(logits, self._tokens, logprobs, processors)
        beams = [
            self._processed_beam_candidates(
                logits, beam.slots, beam.scores, processors, previous, beam.num_candidates
            )
            if beam.processed
            else self._beam_candidates(logits, beam.slots, beam.scores, beam.num_candidates)
            for beam in batch.beams
        ]
        top = None
        if batch.num_logprobs:
            top = self._top_logprobs(logits, self._num_likeliest(batch))
        self._programs_run |= self._programs(batch)
        took_s = time.perf_counter() - start - waited_s
        compile_s = took_s if self.num_compilations > compiled else 0.0
        if self._warm and self.num_compilations > compiled:
            logger.warning(
                "compiled %d programs after warm-up for a step of %s with %d page copies (%.2f s)",
                self.num_compilations - compiled,
                batch.shape,
                len(copies),
                took_s,
            )
            self.num_unplanned_compilations += self.num_compilations - compiled
        return StepResult(self._tokens, logprobs, top, beams, batch.num_samples, compile_s)

    def swap(self, outs: Sequence[tuple[int, int]], ins: Sequence[tuple[int, int]]) -> float:
        """Copies pages to host memory, and others back; after the steps before, before the next.

        Args:
          outs: `(page, host_page)`.
          ins: `(host_page, page)`, of earlier calls' host pages.

        Returns:
          Seconds that compiling took while no step was running; 0 mostly.
        """
        programs = {name for name, pages in (("get_pages", outs), ("set_pages", ins)) if pages}
        if not self._programs_run.issuperset(programs):
            jax.block_until_ready(self._kv_pages)  # as in `run`
        start, compiled = time.perf_counter(), self.num_compilations
        self._host_pages.settle()
        for part in self._parts(outs):
            ids = self._pad_pages([page for page, _ in part])
            pages = self._get_pages(self._kv_pages, ids)
            self._host_pages.put([host_page for _, host_page in part], pages)
        for part in self._parts(ins):
            ids = self._pad_pages([page for _, page in part])
            pages = self._host_pages.get([host_page for host_page, _ in part], len(ids))
            self._kv_pages = self._set_pages(self._kv_pages, ids, pages)
        self._programs_run |= programs
        return time.perf_counter() - start if self.num_compilations > compiled else 0.0

    def warm_up(
        self,
        shapes: Iterable[StepShape],
        num_logprobs: int = 0,
        beams: Iterable[BeamBatch] = (),
        processors: Collection[int] = (),
    ) -> None:
        """Compiles steps of the given shapes, and every size of page copy, ahead of need.

        Args:
          shapes: what to compile; later steps of other shapes count as unplanned.
          num_logprobs: also compile the report of this many likeliest tokens.
          beams: also compile beam searches of these widths and numbers of candidates.
          processors: also compile what changes logits before tokens are chosen, with lists of these
            widths.
        """
        beams, tokens = tuple(beams), self._tokens
        for shape in shapes:
            sizes = self._plan.pages_per_seq, num_logprobs, self._plan.num_groups
            batch = empty_batch(shape, *sizes)
            self.run(dataclasses.replace(batch, beams=beams))
            for width in processors:
                rows = idle_rows(shape.num_rows, -(-self._vocab_size // 8), width)
                processed = tuple(dataclasses.replace(beam, processed=True) for beam in beams)
                self.run(dataclasses.replace(batch, beams=processed, processors=rows))
        self._tokens = tokens  # of a step that is on its way
        null_pair = (pallas_kernels.NULL_PAGE, pallas_kernels.NULL_PAGE)
        count, most = 1, self._max_num_samples * self._plan.num_groups
        while count < 2 * most:
            # The null page may be copied onto itself: nobody reads it.
            copies = [null_pair] * min(count, most)
            self._kv_pages = self._copy_pages(self._kv_pages, *_pad_copies(copies))
            count *= 2
        if self._host_pages.num_pages:
            ids = self._pad_pages([])
            pages = np.asarray(self._get_pages(self._kv_pages, ids))
            self._kv_pages = self._set_pages(self._kv_pages, ids, pages)
            self._programs_run |= {"get_pages", "set_pages"}
        jax.block_until_ready(self._kv_pages)
        self._warm = True

    def recover(self) -> None:
        """Makes the pool and all else on the device whole, after a call that was cut short.

        The content of pages is lost, on the host too. Waits for the steps that are on their way.

        Raises:
          RuntimeError: if the parameters are gone.
          Exception: if the device does not do what it is told; nothing can be run then.
        """
        self._host_pages = HostPages(self._host_pages.num_pages, self._plan)
        if any(getattr(p, "is_deleted", bool)() for p in jax.tree.leaves(self.params)):
            raise RuntimeError("the model's weights are not on the device any more")
        if not _is_usable(self._kv_pages):
            self._kv_pages = None  # what is left of it goes before there is another
            self._kv_pages = self._new_pages()
        self._tokens = self._new_tokens()
        jax.block_until_ready((self._kv_pages, self._tokens))

    def _new_pages(self) -> jax.Array:
        return jax.device_put(jnp.zeros(self._plan.shape, self._plan.dtype), self._device)

    def _new_tokens(self) -> jax.Array:
        return jax.device_put(jnp.zeros(self._max_num_samples, jnp.int32), self._device)

    def _parts(self, pairs: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
        count = self._swap_pages
        return [pairs[i : i + count] for i in range(0, len(pairs), count)]

    def _pad_pages(self, pages: Sequence[int]) -> np.ndarray:
        padded = np.full(self._swap_pages, pallas_kernels.NULL_PAGE, np.int32)
        padded[: len(pages)] = pages
        return padded

    def _num_likeliest(self, batch: Batch) -> int:
        """A power of two, so that requests that differ a little share a program."""
        return min(1 << (batch.num_logprobs - 1).bit_length(), self._vocab_size)

    def _programs(self, batch: Batch) -> set[Hashable]:
        """What `run` calls for a batch, as keys; the step and the sampler have the same."""
        rows, processors = batch.shape.num_rows, batch.processors
        programs: set[Hashable] = {batch.shape}
        if batch.num_logprobs:
            programs.add((rows, self._num_likeliest(batch)))
        width = None
        if processors is not None:
            width = processors.width
            programs.add((rows, "processors", width))
        programs.update(
            (rows, len(beam.slots), beam.num_candidates, width if beam.processed else None)
            for beam in batch.beams
        )
        return programs

    def _counted(self, name: str, function: Callable) -> Callable:
        """Counts the traces of a function, each of which jit follows with a compilation."""

        def traced(*args, **kwargs):
            self.num_compilations += 1
            shapes = [
                f"{leaf.dtype}{list(leaf.shape)}"
                for leaf in jax.tree.leaves((args[1:], kwargs))
                if hasattr(leaf, "shape")
            ]
            logger.debug("compiling %s for %s", name, " ".join(shapes))
            return function(*args, **kwargs)

        traced.__name__ = name  # what traces and dumps call the program
        return traced


def inputs_of(batch: Batch) -> PagedInputs:
    """What the model consumes of a batch."""
    arrays: Any = batch  # of NumPy, which jit takes for its own
    return PagedInputs(
        token_ids=arrays.token_ids,
        positions=arrays.positions,
        rows=Rows(arrays.page_table, arrays.kv_lens, arrays.cu_q_lens, arrays.num_seqs),
        logits_indices=arrays.logits_indices,
    )


def _is_usable(kv_pages: jax.Array | None) -> bool:
    """Whether a pool is there: not donated to a call that was cut short, nor lost by a failure."""
    if kv_pages is None or kv_pages.is_deleted():
        return False
    try:
        kv_pages.block_until_ready()
    except Exception:
        return False
    return True


def _pad_copies(copies: Sequence[tuple[int, int]]) -> np.ndarray:
    """i32[2, count]: sources and destinations, padded to a power of two with the null page."""
    padded = np.full((2, 1 << (len(copies) - 1).bit_length()), pallas_kernels.NULL_PAGE, np.int32)
    padded[:, : len(copies)] = np.array(copies, np.int32).T
    return padded
