# SPDX-License-Identifier: Apache-2.0
"""Several decode steps in one dispatch: nothing of it shows but how often the device is called."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged import SamplingParams
from jpaged.device.burst import burst_function
from jpaged.device.runner import inputs_of
from jpaged.host.batch import StepShape, empty_batch
from jpaged.host.burst import BurstRows
from tests.jpaged.exact import EXACT, run_steps, with_prefix
from tests.jpaged.tiny import TINY, prompts_of, tiny_engine, token_ids

STOP = 12


def counting_model(params, inputs, kv_pages):
    """Says the number after the one that it is given, and notes by position what it was given."""
    del params
    rows = jnp.arange(inputs.token_ids.shape[0])
    kv_pages = kv_pages.at[rows, inputs.positions].set(inputs.token_ids)
    last = inputs.token_ids[inputs.logits_indices]
    # What is visible is what was written: a burst must say so, step by step.
    logits = jax.nn.one_hot(last + 1, 32) * 50
    counted = inputs.rows.kv_lens == inputs.positions[inputs.logits_indices] + 1
    return jnp.where(counted[:, None], logits, jnp.nan), kv_pages


def run_burst(first, slots, num_steps, starts, previous=(0, 0, 0, 0), last_rows=(0, 1, 2, 3)):
    """Four rows, of which those of no steps are padding. Returns: notes, newest, tokens, lps."""
    live = sum(count > 0 for count in num_steps)
    batch = dataclasses.replace(
        empty_batch(StepShape(4, 4), 1),
        token_ids=np.array(first, np.int32),
        previous_slots=np.array(slots, np.int32),
        positions=np.array(starts, np.int32),
        kv_lens=np.array(starts, np.int32) + 1,
        cu_q_lens=np.minimum(np.arange(5), live).astype(np.int32),
        num_seqs=np.array([live], np.int32),
        logits_indices=np.arange(4, dtype=np.int32),
    )
    stops = np.full((4, 2), -1, np.int32)
    stops[:, 0] = STOP
    rows = BurstRows(np.array(num_steps, np.int32), np.array(last_rows, np.int32), stops)
    notes = jnp.full((4, 16), -1, jnp.int32)
    newest = jnp.array(previous, jnp.int32)
    burst = jax.jit(burst_function(counting_model, 8, 6))
    found = burst({}, notes, inputs_of(batch), batch.previous_slots, newest, batch.sampling, rows)
    return [np.asarray(part) for part in found]


class TestProgram:
    def test_rows_take_their_steps_by_hand(self):
        notes, newest, tokens, logprobs = run_burst(
            [3, 20, 0, 0], [-1, -1, -1, -1], [3, 5, 0, 0], [2, 7, 0, 0], last_rows=(1, 0, 0, 0)
        )
        assert tokens[:3, 0].tolist() == [4, 5, 6]
        assert tokens[:5, 1].tolist() == [21, 22, 23, 24, 25]
        assert np.isfinite(logprobs[:5, :2]).all() and np.isnan(logprobs[5:]).all()
        # The first row wrote nothing behind its last token while the other went on.
        assert notes[0].tolist() == [-1, -1, 3, 4, 5, *[-1] * 11]
        assert notes[1].tolist() == [*[-1] * 7, 20, 21, 22, 23, 24, *[-1] * 4]
        # As the next dispatch asks for them: of the last step's samples, the only one is row 1.
        assert newest.tolist() == [25, 6, 6, 6, 0, 0]

    def test_a_stop_token_ends_a_row_and_the_last_one_the_burst(self):
        notes, newest, tokens, logprobs = run_burst(
            [10, 7, 0, 0], [-1, -1, -1, -1], [8, 8, 0, 0], [0, 0, 0, 0]
        )
        assert tokens[:2, 0].tolist() == [11, STOP]
        assert tokens[:5, 1].tolist() == [8, 9, 10, 11, STOP]
        assert np.isnan(logprobs[5:]).all()
        assert notes[0].tolist() == [10, 11, *[-1] * 14]
        assert newest[:2].tolist() == [STOP, STOP]

    def test_what_has_ended_before_computes_nothing(self):
        """The host did not know when it planned the burst; and it cannot know before the next."""
        slots, previous = [1, 0, -1, -1], (STOP, STOP, 0, 0)
        notes, newest, _, logprobs = run_burst(
            [0, 0, 0, 0], slots, [4, 4, 0, 0], [1, 1, 0, 0], previous
        )
        assert (notes == -1).all() and np.isnan(logprobs).all()
        assert newest[:2].tolist() == [STOP, STOP]
        # A token of a prompt ends nothing.
        _, _, tokens, _ = run_burst([STOP, 0, 0, 0], [-1] * 4, [2, 0, 0, 0], [1, 0, 0, 0])
        assert tokens[:2, 0].tolist() == [STOP + 1, STOP + 2]


@functools.cache
def engine_of(decode_steps, **config):
    return tiny_engine(**EXACT, decode_steps=decode_steps, **config)


def params_of(max_tokens, seed, **others):
    return SamplingParams(max_tokens=max_tokens, temperature=1.2, seed=seed, **others)


# What can burst, and beside it what cannot: while that runs, steps come one by one.
PLAIN = [
    params_of(30, 1),
    params_of(23, 2, n=3),
    params_of(40, 3, stop_token_ids=tuple(range(0, 97, 9))),
    params_of(1, 4),
    SamplingParams(max_tokens=17, temperature=0),
    params_of(28, 5, top_k=9, top_p=0.9),
]
OTHERS = [
    params_of(9, 6, logprobs=2),
    params_of(12, 7, presence_penalty=1.5),
    SamplingParams(max_tokens=6, beam_width=3),
]


def seen(outputs):
    return [
        [(c.token_ids, c.cumulative_logprob, c.logprobs, c.finish_reason) for c in o.outputs]
        for o in outputs
    ]


class TestOutputs:
    @pytest.mark.parametrize(("prefix_cache", "num_pages"), [(True, 17), (False, 26)])
    def test_they_are_those_of_single_steps_to_the_bit(self, prefix_cache, num_pages):
        """In a pool that preempts, with all kinds of requests beside each other."""
        prompts, params = with_prefix([3, 9, 1, 6, 2, 8, 4, 7, 5]), [*OTHERS, *PLAIN]
        config = dict(num_pages=num_pages, prefix_cache=prefix_cache)
        found = []
        for engine in (engine_of(1, **config), engine_of(8, **config)):
            engine.reset_stats()
            ids = [
                engine.add_request(*each, stream=index % 2 == 0)
                for index, each in enumerate(zip(prompts, params, strict=True))
            ]
            done = run_steps(engine)
            found.append(seen(done[request_id] for request_id in ids))
            totals = engine.stats().totals
            assert totals.num_preemptions > 0
            assert (totals.num_dispatches < totals.num_steps) == (engine.config.decode_steps > 1)
        assert found[0] == found[1]

    def test_one_by_one_they_are_dispatched_together(self):
        """Of 17 tokens the prompt's step gives one, and two bursts of eight the others."""
        engine = engine_of(8, num_pages=17, prefix_cache=True)
        (prompt,) = prompts_of([9])
        for num_tokens, dispatches in ((17, 3), (18, 4), (1, 1)):
            engine.reset_stats()
            engine.generate([prompt], SamplingParams(max_tokens=num_tokens, temperature=0))
            totals = engine.stats().totals
            assert (totals.num_steps, totals.num_dispatches) == (num_tokens, dispatches)
            assert totals.num_generated_tokens == num_tokens

    def test_what_comes_meanwhile_starts_with_the_next_dispatch(self):
        engine = engine_of(8, num_pages=17, prefix_cache=True)
        prompts = prompts_of([9, 5])
        engine.add_request(prompts[0], params_of(60, 1))
        for _ in range(3):
            engine.step()
        second = engine.add_request(prompts[1], params_of(1, 2))
        assert engine.step() == []  # reads what ran already, dispatches the prompt
        (output,) = engine.step()
        assert output.request_id == second
        (alone,) = engine_of(1, num_pages=17, prefix_cache=True).generate(
            prompts[1:], params_of(1, 2)
        )
        assert token_ids([output]) == token_ids([alone])
        run_steps(engine)

    def test_pages_that_a_stop_leaves_unused_are_free_when_it_is_read(self):
        engine = engine_of(8, num_pages=17, prefix_cache=True)
        prompts = prompts_of([9, 5])
        (free,) = engine.generate(prompts[:1], params_of(20, 1))
        stop = free.outputs[0].token_ids[3]
        assert stop not in free.outputs[0].token_ids[:3]
        engine.add_request(prompts[0], params_of(60, 1, stop_token_ids=(stop,)))
        other = engine.add_request(prompts[1], params_of(80, 2))
        engine.step()
        engine.step()  # the burst is on its way
        # Of both the 8 tokens of the burst have pages already: 9 + 8 and 5 + 8 of pages of 8.
        assert engine.stats().num_used_pages == 3 + 2
        (stopped,) = engine.step()
        assert token_ids([stopped]) == [[free.outputs[0].token_ids[:4]]]
        # The other one's next burst was planned by then.
        request = engine._live.by_id[other]
        held = request.sequences[0].num_computed_tokens
        assert held == 5 + 16 and engine.stats().num_used_pages == math.ceil(held / 8)
        engine.check_invariants()
        engine.abort(other)
        assert engine.stats().num_used_pages == 0

    def test_a_stream_gets_the_tokens_of_a_dispatch_at_once(self):
        engine = engine_of(8, num_pages=17, prefix_cache=True)
        stream = engine.stream(prompts_of([9])[0], params_of(12, 1))
        assert [len(output.outputs[0].token_ids) for output in stream] == [1, 9, 12]

    def test_damaged_weights_are_told_by_the_first_token_that_shows_it(self):
        engine = engine_of(8, num_pages=17, prefix_cache=True)
        (prompt,) = prompts_of([9])
        engine.add_request(prompt, params_of(20, 1))
        engine.step()
        whole, runner = engine._runner.params, engine._runner
        runner.params = jax.tree.map(lambda leaf: leaf * jnp.nan, whole)
        try:
            done = run_steps(engine)
        finally:
            runner.params = whole
        ((completion,),) = (output.outputs for output in done.values())
        assert completion.finish_reason == "error" and len(completion.token_ids) == 1
        assert "for the token at position 10" in completion.error
        engine.reset_prefix_cache()


def test_outputs_are_equal_with_padded_shapes_and_all_is_compiled_ahead():
    """As engines are that are not deterministic: a shape a number of rows, tokens the same."""
    prompts, ends = with_prefix([3, 9, 1]), (7, 30)
    stopped = [
        dataclasses.replace(own, stop_token_ids=(*own.stop_token_ids, *ends)) for own in PLAIN[:3]
    ]
    want = engine_of(1, num_pages=26, prefix_cache=False).generate(prompts, stopped)
    engine = tiny_engine(
        decode_steps=8,
        max_num_seqs=2,
        max_num_batched_tokens=8,
        page_size=4,
        model_config=dataclasses.replace(TINY, eos_token_ids=ends),
    )
    engine.warm_up()
    outputs = engine.generate(prompts, PLAIN[:3])
    assert token_ids(outputs) == token_ids(want)
    reasons = [[sample.finish_reason for sample in output.outputs] for output in outputs]
    assert {"stop", "length"} == {reason for own in reasons for reason in own}
    stats = engine.stats()
    assert stats.num_unplanned_compilations == 0
    assert stats.totals.num_dispatches < stats.totals.num_steps


@pytest.mark.parametrize("steps", [0, 65, 1.5])
def test_settings_out_of_range_are_refused(steps):
    with pytest.raises(ValueError, match=f"decode_steps={steps} must be"):
        tiny_engine(decode_steps=steps)
