# SPDX-License-Identifier: Apache-2.0
"""Chooses tokens from logits on the device: pure, jitted, with parameters of each row's own."""

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.host.batch import SamplingRows
from jpaged.host.logits_processors import ProcessorRows

_ARGMAX_BLOCK = 128  # columns
_TOP_K_BLOCK = 64  # columns


def sample(logits: jax.Array, rows: SamplingRows) -> tuple[jax.Array, jax.Array]:
    """Chooses one token a row.

    The random bits of a token depend on its request's seed, its sample and its position, and on
    nothing else: not on the row, the step or the other rows.

    Args:
      logits: f32[num_samples, vocab_size].
      rows: parameters of each sample.

    Returns:
      i32[num_samples] tokens and f32[num_samples], their log-probabilities under the model as it
      is, before temperature and filters.
    """
    vocab_size = logits.shape[-1]
    # Beside the largest, so that neither a tiny temperature nor large logits overflow or round.
    logits = logits - logits.max(axis=-1, keepdims=True)
    greedy = _first_largest(logits)

    def draw() -> jax.Array:
        scaled = _divided(logits, rows)
        filters = (rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0)
        scaled = jax.lax.cond(
            (filters & (rows.temperature > 0)).any(), lambda: _filter(scaled, rows), lambda: scaled
        )
        noise = jax.vmap(lambda *ids: jax.random.gumbel(_token_key(*ids), (vocab_size,)))
        scaled = scaled + noise(rows.seeds, rows.sample_indices, rows.positions)
        return jnp.where(rows.temperature > 0, _first_largest(scaled), greedy)

    tokens = jax.lax.cond((rows.temperature > 0).any(), draw, lambda: greedy)
    chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
    # No logsumexp: the largest is 0 already.
    return tokens, chosen - jnp.log(jnp.exp(logits).sum(axis=-1))


def mark_not_finite(logits: jax.Array, logprobs: jax.Array) -> jax.Array:
    """Sets log-probabilities to NaN where a model has failed.

    Args:
      logits: f32[num_samples, vocab_size], as the model gives them, before anything is masked.
      logprobs: f32[num_samples], of the tokens that were chosen.

    Returns:
      f32[num_samples]: NaN where a logit of the row is NaN or infinite.
    """
    return jnp.where(jnp.isfinite(logits).all(axis=-1), logprobs, jnp.nan)


def process_logits(logits: jax.Array, rows: ProcessorRows, previous: jax.Array) -> jax.Array:
    """Changes logits, or log-probabilities, as transformers' and vLLM's processors do.

    In the order of both: biases are added, then comes the repetition penalty, then the frequency
    penalty and the presence penalty. What cannot be chosen is -inf, whatever is done before or
    after. Rows that ask for nothing stay as they are, to the bit.

    Args:
      logits: f32[num_samples, vocab_size].
      rows: what is asked for.
      previous: i32[slots], tokens of the step before.
    """
    vocab_size = logits.shape[-1]
    # Slot -1 indexes the last sample, and is then not used.
    uncounted = jnp.where(rows.previous_slots < 0, -1, previous[rows.previous_slots])
    newest = jnp.where(rows.previous_slots < 0, rows.newest, uncounted)
    if rows.width:
        logits = _add_biases(logits, rows, newest)
    seen = _bits(rows.seen, vocab_size) | (jnp.arange(vocab_size)[None] == uncounted[:, None])
    penalty = rows.repetition_penalty[:, None]
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    logits = jnp.where(seen, penalised, logits)
    logits = jnp.where(_bits(rows.blocked, vocab_size), -jnp.inf, logits)
    return _subtract_penalties(logits, rows, uncounted) if rows.width else logits


def _add_biases(logits: jax.Array, rows: ProcessorRows, newest: jax.Array) -> jax.Array:
    always = rows.bias_after == -1
    now = rows.bias_after == newest[:, None]
    found = jnp.take_along_axis(logits, rows.bias_tokens, axis=-1) + rows.bias
    logits = _put(logits, jnp.where(always, rows.bias_tokens, -1), found)
    # In place of what was there: it has that in it.
    return _put(logits, jnp.where(now, rows.bias_tokens, -1), found)


def _subtract_penalties(logits: jax.Array, rows: ProcessorRows, uncounted: jax.Array) -> jax.Array:
    """Subtracts frequency and presence penalties.

    Args:
      logits: f32[num_samples, vocab_size].
      rows: of which the presence penalty and what belongs to counted tokens is read.
      uncounted: i32[num_samples], a token that comes on top; -1 is none.
    """
    again = rows.counted_tokens == uncounted[:, None]
    first = jnp.where(again.any(axis=-1), -1, uncounted)
    tokens = jnp.concatenate([rows.counted_tokens, first[:, None]], axis=-1)
    penalties = jnp.where(again, rows.next_penalties, rows.penalties)
    penalties = jnp.concatenate([penalties, rows.frequency_penalty[:, None]], axis=-1)
    found = jnp.take_along_axis(logits, tokens, axis=-1) - penalties
    return _put(logits, tokens, found - rows.presence_penalty[:, None])


def _put(logits: jax.Array, tokens: jax.Array, values: jax.Array) -> jax.Array:
    """Sets the logits of i32[num_samples, width] tokens, each once in a row; -1 is none."""
    # Where they are, negative indices count from the end.
    tokens = jnp.where(tokens < 0, logits.shape[-1], tokens)
    return logits.at[jnp.arange(logits.shape[0])[:, None], tokens].set(values, mode="drop")


def model_logprobs(
    logits: jax.Array, tokens: jax.Array, sampled: jax.Array, rows: ProcessorRows
) -> jax.Array:
    """Log-probabilities of tokens under the model as it is, where processors changed the logits.

    Args:
      logits: f32[num_samples, vocab_size], as the model gave them.
      tokens: i32, the chosen ones, padded.
      sampled: f32[num_samples], what `sample` returned, which stays where nothing was changed.
      rows: what was changed.

    Returns:
      f32[num_samples]; NaN as by `mark_not_finite`.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, tokens[: logits.shape[0], None], axis=-1)[:, 0]
    return mark_not_finite(logits, jnp.where(rows.active, own, sampled))


def target_logprobs(logits: jax.Array, targets: jax.Array) -> jax.Array:
    """Log-probabilities of given tokens under the model as it is.

    Args:
      logits: f32[num_samples, vocab_size], as the model gives them.
      targets: i32[num_samples], a token each.

    Returns:
      f32[num_samples]; NaN as by `mark_not_finite`.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    own = jnp.take_along_axis(logprobs, targets[:, None], axis=-1)[:, 0]
    return mark_not_finite(logits, own)


def drawn_logprobs(
    logits: jax.Array, tokens: jax.Array, rows: SamplingRows, filtered: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities of what tokens are drawn from, by temperature and filters.

    Args:
      logits: f32[num_samples, vocab_size], as `sample` took them.
      tokens: i32, the chosen ones, padded.
      rows: parameters of each sample.
      filtered: bool[num_samples], whether what filters cut off is -inf, where any apply.
      count: how many likeliest tokens; static.

    Returns:
      f32[num_samples] of the chosen tokens; i32 and f32[num_samples, count] likeliest tokens and
      theirs, as `top_logprobs` does.
    """
    scaled = _divided(logits - logits.max(axis=-1, keepdims=True), rows)
    tokens = tokens[: logits.shape[0], None]
    # What was drawn is left in any case, however another program rounds at a filter's edge.
    own = jnp.arange(logits.shape[-1])[None] == tokens
    applied = (filtered & (rows.temperature > 0))[:, None]
    scaled = jax.lax.cond(
        applied.any(),
        lambda: jnp.where(applied & ~own, _filter(scaled, rows), scaled),
        lambda: scaled,
    )
    logprobs = jax.nn.log_softmax(scaled, axis=-1)
    values, likeliest = jax.lax.top_k(logprobs, count)
    return jnp.take_along_axis(logprobs, tokens, axis=-1)[:, 0], likeliest, values


def top_logprobs(logits: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The likeliest tokens of each row.

    Args:
      logits: f32[num_samples, vocab_size].
      count: how many; static.

    Returns:
      i32[num_samples, count] tokens, likeliest first, and their log-probabilities, f32.
    """
    logprobs, tokens = jax.lax.top_k(jax.nn.log_softmax(logits, axis=-1), count)
    return tokens, logprobs


def beam_candidates(
    logits: jax.Array, slots: jax.Array, scores: jax.Array, count: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The best continuations of a request's beams.

    Args:
      logits: f32[num_samples, vocab_size].
      slots: i32[width], which samples are the beams.
      scores: f32[width], sums of the beams' log-probabilities; -inf where there is no beam.
      count: how many continuations; static.

    Returns:
      f32[count] scores, best first, -inf where there are not so many; i32[count], which beam each
      continues, as a place in `slots`; and i32[count], with which token.
    """
    logprobs = jax.nn.log_softmax(logits[slots], axis=-1)
    return _best_continuations(logprobs + scores[:, None], count)


def processed_beam_candidates(
    logits: jax.Array,
    slots: jax.Array,
    scores: jax.Array,
    rows: ProcessorRows,
    previous: jax.Array,
    count: int,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """As `beam_candidates`, by log-probabilities that processors change, as in transformers.

    Args:
      logits: f32[num_samples, vocab_size].
      slots: i32[width], which samples are the beams.
      scores: f32[width], sums of what the beams were chosen by; -inf where there is no beam.
      rows: what is changed, one entry a sample.
      previous: i32, tokens of the step before.
      count: how many continuations; static.

    Returns:
      What `beam_candidates` does, and f32[count], the tokens' log-probabilities under the model as
      it is.
    """
    logprobs = jax.nn.log_softmax(logits[slots], axis=-1)
    own = ProcessorRows(*(leaf[slots] for leaf in rows))
    processed = process_logits(logprobs, own, previous)
    renormalized = jax.nn.log_softmax(processed, axis=-1)
    processed = jnp.where(own.renormalized[:, None], renormalized, processed)
    values, beams, tokens = _best_continuations(processed + scores[:, None], count)
    return values, beams, tokens, logprobs[beams, tokens]


def _best_continuations(totals: jax.Array, count: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest of f32[width, vocab_size], with their places; see `beam_candidates`."""
    vocab_size = totals.shape[1]
    # The best are in as many blocks of columns as there are best, those with the largest maxima:
    # to sort these and then their columns takes half as long as to sort all (docs/decisions.md).
    totals = totals.reshape(-1)
    size = totals.shape[0]
    width = min(_TOP_K_BLOCK, size)
    blocks = jnp.pad(totals, (0, -size % width), constant_values=-jnp.inf).reshape(-1, width)
    _, best = jax.lax.top_k(blocks.max(axis=1), min(count, blocks.shape[0]))
    best = jnp.sort(best)  # so that the first of equals is taken
    found = blocks[best].reshape(-1)
    found = jnp.pad(found, (0, max(count - found.shape[0], 0)), constant_values=-jnp.inf)
    values, places = jax.lax.top_k(found, count)
    places = best[jnp.minimum(places // width, best.shape[0] - 1)] * width + places % width
    places = jnp.minimum(places, size - 1)
    return values, places // vocab_size, places % vocab_size


def _divided(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Logits divided by temperature, where that is not 0."""
    return logits / jnp.where(rows.temperature > 0, rows.temperature, 1)[:, None]


def _bits(bitmaps: jax.Array | np.ndarray, count: int) -> jax.Array:
    """bool[rows, count] of u8[rows, bytes], the lowest bit of a byte first."""
    bits = (jnp.asarray(bitmaps)[:, :, None] >> jnp.arange(8, dtype=jnp.uint8)[None, None]) & 1
    return bits.reshape(bits.shape[0], -1)[:, :count].astype(bool)


def _first_largest(logits: jax.Array) -> jax.Array:
    """i32[rows]: argmax, in the block with the largest: over a whole row it is not vectorised."""
    blocks = jnp.pad(
        logits, ((0, 0), (0, -logits.shape[-1] % _ARGMAX_BLOCK)), constant_values=-jnp.inf
    ).reshape(logits.shape[0], -1, _ARGMAX_BLOCK)
    block = blocks.max(axis=-1).argmax(axis=-1).astype(jnp.int32)
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0].argmax(axis=-1)
    # Never padding: it comes last in its block, and the first of equals is taken.
    return (block * _ARGMAX_BLOCK + inside).astype(jnp.int32)


def _token_key(seed: jax.Array, sample_index: jax.Array, position: jax.Array) -> jax.Array:
    # The implementation is named: results must not change with a user's jax_default_prng_impl.
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(jax.random.fold_in(key, sample_index), position)


def _filter(logits: jax.Array, rows: SamplingRows) -> jax.Array:
    """Sets logits that top_k, then top_p, then min_p cut off to -inf; keeps ties at the edge.

    Thresholds are found by bisection over the float32 numbers, which is exact and needs no sort of
    the vocabulary (a sort took longer than a decode step on CPU: docs/decisions.md).
    """
    top_k = jnp.where(rows.top_k > 0, jnp.minimum(rows.top_k, logits.shape[-1]), logits.shape[-1])
    kept = _largest_threshold(logits, lambda above: above.sum(axis=-1, dtype=jnp.int32) >= top_k)
    logits = jnp.where(logits >= kept[:, None], logits, -jnp.inf)

    probs = jax.nn.softmax(logits, axis=-1)
    kept = _largest_threshold(
        probs, lambda above: jnp.where(above, probs, 0).sum(axis=-1) >= rows.top_p
    )
    # Rounding can leave the whole mass short of 1; then nothing is cut.
    cut = (rows.top_p < 1)[:, None] & (probs < kept[:, None])
    logits = jnp.where(cut, -jnp.inf, logits)

    least = jnp.max(probs, axis=-1) * rows.min_p
    return jnp.where(probs < least[:, None], -jnp.inf, logits)


def _largest_threshold(values: jax.Array, enough) -> jax.Array:
    """The largest t in each row for which `enough(values >= t)` holds; it falls as t grows.

    Args:
      values: f32[rows, columns], no NaN.
      enough: bool[rows, columns] -> bool[rows].

    Returns:
      f32[rows], one of the row's values; NaN, which nothing is below, where no t is small enough.
    """
    # Same-sized integers in the order of the floats: negative floats have all their bits turned.
    bits = jax.lax.bitcast_convert_type(values, jnp.int32)
    order = jnp.where(bits < 0, bits ^ jnp.int32(0x7FFFFFFF), bits)
    low = jnp.full(values.shape[0], jnp.iinfo(jnp.int32).min, jnp.int32)
    high = order.max(axis=-1)

    def halve(_, bounds):
        low, high = bounds
        # (low + high) / 2 rounded up, without the sum, which may not fit.
        middle = (low | high) - ((low ^ high) >> 1)
        holds = enough(order >= middle[:, None])
        return jnp.where(holds, middle, low), jnp.where(holds, high, middle - 1)

    low, _ = jax.lax.fori_loop(0, 32, halve, (low, high))
    bits = jnp.where(low < 0, low ^ jnp.int32(0x7FFFFFFF), low)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)
