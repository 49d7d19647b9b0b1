# SPDX-License-Identifier: Apache-2.0
"""Runs steps on the device: owns the page pool, and donates it to every step."""

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged import pallas_kernels
from jpaged.device.compile_threads import CompileThreads
from jpaged.device.host_pages import HostPages
from jpaged.device.memory import PoolPlan
from jpaged.device.programs import ApplyFn, Programs
from jpaged.device.step_result import BurstResult, StepResult
from jpaged.host.batch import Batch, StepShape, empty_batch
from jpaged.host.burst import idle_burst
from jpaged.host.logits_processors import idle_rows
from jpaged.host.logprobs import idle_modes
from jpaged.host.prompt_cache import PageLoad
from jpaged.host.score_batch import idle_scores
from jpaged.host.warm_up import WarmUpPlan, idle_beams
from jpaged.models.inputs import PagedInputs
from jpaged.models.sharding import placements
from jpaged.pallas_kernels import layout
from jpaged.pallas_kernels.rows import Rows

logger = logging.getLogger(__name__)

# Pages of a group that are swapped by one program, so that there is one for any number.
SWAP_PAGES = 16

# One program for each shape, which can be compiled before; its parts one by one could not.
zeros = jax.jit(jnp.zeros, static_argnums=(0, 1))


class ModelRunner:
    """The device side of an engine, and the only owner of the page pool.

    Steps are dispatched in order and run in order, so a page that the host has given to another
    sequence is written only after the steps that read it.

    Attributes:
      programs: what it calls.
      num_unplanned_compilations: those compiled after `warm_up`; each is logged with its shape.
      decode_steps: most steps of a burst; with 1 there are none.
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
        decode_steps: int = 1,
        strict: bool = False,
        saves_pages: bool = False,
        ahead: CompileThreads | None = None,
    ):
        """Allocates the pool.

        Args:
          apply: the model as a pure function.
          params: its parameters; replace the attribute between steps to swap weights, in the form
            that it has: others, such as projections that are not merged, compile anew.
          plan: the pool's dimensions.
          max_num_samples: most samples a step takes.
          vocab_size: of the logits.
          backend: which kernels copy pages.
          num_host_pages: pages that host memory has room for.
          decode_steps: most steps of a burst.
          strict: whether a step that would compile something after `warm_up` is refused.
          saves_pages: whether `read_pages` and `write_pages` will be called.
          ahead: what compiles first steps for the same arguments; its programs are called.
        """
        # All on one device by name: jit compiles anew, without a trace, when an argument goes from
        # a default placement to the one that an earlier step's result has.
        device = jax.local_devices()[0]
        where = placements(params, jax.sharding.SingleDeviceSharding(device))
        self.params = jax.device_put(params, where)
        self._ahead = ahead
        self.programs = (
            ahead.programs
            if ahead is not None
            else Programs(
                apply,
                max_num_samples=max_num_samples,
                vocab_size=vocab_size,
                backend=backend,
                decode_steps=decode_steps,
            )
        )
        self.num_unplanned_compilations = 0
        self._warm: WarmUpPlan | None = None
        self._strict, self._saves_pages = strict, saves_pages
        self.decode_steps = decode_steps
        self._plan = plan
        self._swap_pages = SWAP_PAGES * plan.num_groups
        self._vocab_size = vocab_size
        self._max_num_samples = max_num_samples
        self._device = device
        self._kv_pages, self._tokens = self._new_pages(), self._new_tokens()
        self._host_pages = HostPages(num_host_pages, plan)

    def is_compiled(self, batch: Batch) -> bool:
        """Whether `run` would start at once: all that it calls ran before, but for page copies."""
        return self.programs.ran.issuperset(self.programs.needed(batch))

    def run(
        self, batch: Batch, copies: Iterable[tuple[int, int]] = (), *, warms_up: bool = False
    ) -> StepResult | BurstResult:
        """Dispatches a step, or those of a burst, and returns without waiting for it.

        Args:
          batch: what to compute.
          copies: `(src, dst)` pages to copy first.
          warms_up: whether it is run to be compiled: what it compiles is not unplanned.

        Returns:
          The samples, to be read when they are needed.

        Raises:
          UnplannedProgramError: if it is strict, and the step would compile; nothing has run then.
        """
        programs = self.programs
        is_held = self._warm is not None and not warms_up
        if self._strict and is_held:
            programs.check_planned(batch)
        start, compiled = time.perf_counter(), programs.num_compiled_here
        waited = self._ahead is not None and self._ahead.wait(batch.shape)
        if copies := list(copies):
            self._kv_pages = programs.copy_pages(self._kv_pages, *_pad_copies(copies))
        result, waited_s = self._run_step(batch) if batch.burst is None else self._run_burst(batch)
        programs.ran |= programs.needed(batch)
        took_s = time.perf_counter() - start - waited_s
        compiled = programs.num_compiled_here - compiled
        compile_s = took_s if compiled or waited else 0.0
        if is_held and compiled:
            logger.warning(
                "compiled %d programs after warm-up for a step of %s with %d page copies (%.2f s)",
                compiled,
                batch.shape,
                len(copies),
                took_s,
            )
            self.num_unplanned_compilations += compiled
        return dataclasses.replace(result, compile_s=compile_s)

    def _run_burst(self, batch: Batch) -> tuple[BurstResult, float]:
        assert batch.burst is not None
        self._kv_pages, self._tokens, tokens, logprobs = self.programs.burst(
            self.params,
            self._kv_pages,
            inputs_of(batch),
            batch.previous_slots,
            self._tokens,
            batch.sampling,
            batch.burst.rows,
        )
        return BurstResult(tokens, logprobs, batch.burst.samples), 0.0

    def _run_step(self, batch: Batch) -> tuple[StepResult, float]:
        """Dispatches a step by itself. Returns: its samples, and seconds that it was waited for."""
        programs, waited_s = self.programs, 0.0
        logits, self._kv_pages = programs.step(
            self.params, self._kv_pages, inputs_of(batch), batch.previous_slots, self._tokens
        )
        if not self.is_compiled(batch):
            # What is compiled next would hide what the step takes, and compete with it.
            ready = time.perf_counter()
            jax.block_until_ready(logits)
            waited_s = time.perf_counter() - ready
        processors, previous, chosen_from = batch.processors, self._tokens, logits
        if processors is not None:
            chosen_from = programs.process(logits, processors, previous)
        self._tokens, logprobs = programs.sample(chosen_from, batch.sampling)
        if processors is not None:
            logprobs = programs.model_logprobs(logits, self._tokens, logprobs, processors)
        beams = [
            programs.processed_beam_candidates(
                logits, beam.slots, beam.scores, processors, previous, beam.num_candidates
            )
            if beam.processed
            else programs.beam_candidates(logits, beam.slots, beam.scores, beam.num_candidates)
            for beam in batch.beams
        ]
        top = None
        if batch.num_logprobs:
            count = programs.num_likeliest(batch.num_logprobs)
            top = (*programs.top_logprobs(logits, count), batch.num_logprobs)
        modes = None
        if batch.modes is not None:
            filtered, slots, wanted = batch.modes
            count = programs.num_likeliest(wanted)
            found = programs.drawn_logprobs(
                chosen_from, self._tokens, batch.sampling, filtered, count
            )
            modes = found, slots, wanted
        scores = None
        if batch.scores is not None:
            found = programs.target_logprobs(logits, batch.scores.targets)
            scores = found, batch.scores.slots
        found = self._tokens, logprobs, top, beams, batch.num_samples, scores, modes
        return StepResult(*found), waited_s

    def swap(self, outs: Sequence[tuple[int, int]], ins: Sequence[tuple[int, int]]) -> float:
        """Copies pages to host memory, and others back; after the steps before, before the next.

        Args:
          outs: `(page, host_page)`.
          ins: `(host_page, page)`, of earlier calls' host pages.

        Returns:
          Seconds that compiling took while no step was running; 0 mostly.
        """
        programs = self.programs
        needed = {name for name, pages in (("get_pages", outs), ("set_pages", ins)) if pages}
        if not programs.ran.issuperset(needed):
            jax.block_until_ready(self._kv_pages)  # as in `run`
        start, compiled = time.perf_counter(), programs.num_compiled_here
        self._host_pages.settle()
        for part in self._parts(outs):
            ids = self._pad_pages([page for page, _ in part])
            pages = programs.get_pages(self._kv_pages, ids)
            self._host_pages.put([host_page for _, host_page in part], pages)
        for part in self._parts(ins):
            ids = self._pad_pages([page for _, page in part])
            pages = self._host_pages.get([host_page for host_page, _ in part], len(ids))
            self._kv_pages = programs.set_pages(self._kv_pages, ids, pages)
        programs.ran |= needed
        return time.perf_counter() - start if programs.num_compiled_here > compiled else 0.0

    def read_pages(self, pages: Sequence[int]) -> np.ndarray:
        """Copies pages to the host, after the steps before.

        Returns:
          `[len(pages), *page_shape]`, of the pool's dtype.
        """
        found = np.empty((len(pages), *layout.page_shape(self._plan.shape)), self._plan.dtype)
        count, arriving = self._swap_pages, list[tuple[int, jax.Array]]()
        for at in range(0, len(pages) + 2 * count, count):
            if at < len(pages):
                ids = self._pad_pages(pages[at : at + count])
                arriving.append((at, self.programs.get_pages(self._kv_pages, ids)))
                arriving[-1][1].copy_to_host_async()
            # The device keeps copies of two parts at most.
            if arriving and (len(arriving) > 1 or at >= len(pages)):
                start, part = arriving.pop(0)
                found[start : start + count] = np.asarray(part)[: len(pages) - start]
        self.programs.ran.add("get_pages")
        return found

    def write_pages(self, loads: Sequence[PageLoad]) -> float:
        """Puts pages into the pool; after the steps before, before the next.

        Returns:
          Seconds that compiling took; 0 mostly.
        """
        if "set_pages" not in self.programs.ran:
            jax.block_until_ready(self._kv_pages)  # as in `run`
        start, compiled = time.perf_counter(), self.programs.num_compiled_here
        pages = [page for load in loads for page in load.pages]
        shape = layout.page_shape(self._plan.shape)
        content = np.concatenate([load.content for load in loads])
        content = content.view(self._plan.dtype).reshape(-1, *shape)
        for at in range(0, len(pages), self._swap_pages):
            ids = self._pad_pages(pages[at : at + self._swap_pages])
            # The null page may be written: nobody reads it.
            part = np.zeros((len(ids), *shape), self._plan.dtype)
            own = content[at : at + len(ids)]
            part[: len(own)] = own
            self._kv_pages = self.programs.set_pages(self._kv_pages, ids, part)
        self.programs.ran.add("set_pages")
        took_s = time.perf_counter() - start
        return took_s if self.programs.num_compiled_here > compiled else 0.0

    def warm_up(self, plan: WarmUpPlan) -> None:
        """Compiles steps, and every size of page copy, ahead of need.

        Args:
          plan: what to compile that did not run before; later steps that call something else count
            as unplanned.
        """
        if plan == self._warm:
            return
        tokens = self._tokens
        for shape in plan.shapes:
            for batch in self._idle_batches(shape, plan):
                if not self.is_compiled(batch):
                    self.run(batch, warms_up=True)
        self._tokens = tokens  # of a step that is on its way
        null_pair = (pallas_kernels.NULL_PAGE, pallas_kernels.NULL_PAGE)
        count, most = 1, self._max_num_samples * self._plan.num_groups
        while count < 2 * most:
            # The null page may be copied onto itself: nobody reads it.
            copies = [null_pair] * min(count, most)
            self._kv_pages = self.programs.copy_pages(self._kv_pages, *_pad_copies(copies))
            count *= 2
        if self._host_pages.num_pages or self._saves_pages:
            ids = self._pad_pages([])
            pages = np.asarray(self.programs.get_pages(self._kv_pages, ids))
            self._kv_pages = self.programs.set_pages(self._kv_pages, ids, pages)
            self.programs.ran |= {"get_pages", "set_pages"}
        jax.block_until_ready(self._kv_pages)
        self._warm = plan

    def _idle_batches(self, shape: StepShape, plan: WarmUpPlan) -> Iterator[Batch]:
        """Steps of a shape that together call all that a plan has for it, and change nothing."""
        rows, asked = shape.num_rows, dataclasses.replace
        empty = empty_batch(shape, self._plan.pages_per_seq, 0, self._plan.num_groups)
        beams = tuple(idle_beams(*search) for search in plan.beams)
        yield asked(empty, beams=beams, scores=idle_scores(rows) if plan.scores else None)
        yield from (asked(empty, num_logprobs=count) for count in plan.likeliest)
        yield from (asked(empty, modes=idle_modes(rows, count)) for count in plan.modes)
        beams = tuple(idle_beams(*search, processed=True) for search in plan.beams)
        for width in plan.processors:
            processors = idle_rows(rows, -(-self._vocab_size // 8), width)
            yield asked(empty, beams=beams, processors=processors)
        if self.programs.decode_steps > 1 and shape in plan.bursts:
            yield asked(empty, burst=idle_burst(rows))

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
        return jax.device_put(zeros(self._plan.shape, self._plan.dtype), self._device)

    def _new_tokens(self) -> jax.Array:
        return jax.device_put(zeros((self._max_num_samples,), np.int32), self._device)

    def _parts(self, pairs: Sequence[tuple[int, int]]) -> list[Sequence[tuple[int, int]]]:
        count = self._swap_pages
        return [pairs[i : i + count] for i in range(0, len(pairs), count)]

    def _pad_pages(self, pages: Sequence[int]) -> np.ndarray:
        padded = np.full(self._swap_pages, pallas_kernels.NULL_PAGE, np.int32)
        padded[: len(pages)] = pages
        return padded


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
