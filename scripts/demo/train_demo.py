# SPDX-License-Identifier: Apache-2.0
"""Trains the checkpoint that the repository ships, on text that `scripts.demo.corpus` writes.

    python -m scripts.demo.train_demo

The defaults are the shipped run. It needs no accelerator and no network.
"""

import functools
import itertools
import os
import pathlib
import shlex
import sys
import time
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging
from flax.training.train_state import TrainState
from tokenizers import Tokenizer
from tqdm import tqdm

from jpaged.models.checkpoint import save_orbax
from jpaged.models.config import dense_config
from jpaged.models.decoder import Decoder, Params
from jpaged.scripts.demo.corpus import stories
from jpaged.scripts.demo.tokenizer import EOS, train_tokenizer

_OUTPUT = flags.DEFINE_string("output", "models/demo", "Directory to write the checkpoint to.")
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the corpus, the weights and the samples.")
_STEPS = flags.DEFINE_integer("steps", 2400, "Optimizer steps.", lower_bound=1)
_BATCH_SIZE = flags.DEFINE_integer("batch_size", 8, "Sequences a step.", lower_bound=2)
_SEQ_LEN = flags.DEFINE_integer("seq_len", 256, "Tokens a sequence.", lower_bound=2)
_LONG_STEPS = flags.DEFINE_integer(
    "long_steps", 300, "Last steps, on sequences twice as long and half as many.", lower_bound=0
)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", 3e-3, "Peak learning rate.", lower_bound=0)
_WARMUP_STEPS = flags.DEFINE_integer("warmup_steps", 100, "Steps to the peak.", lower_bound=0)
_WEIGHT_DECAY = flags.DEFINE_float("weight_decay", 0.1, "Decay of the matrices.", lower_bound=0)
_EVAL_EVERY = flags.DEFINE_integer("eval_every", 400, "Steps between evaluations.", lower_bound=1)

_CONFIG = dense_config(
    family="LlamaForCausalLM",
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=512,
    num_layers=6,
    num_q_heads=6,
    num_kv_heads=2,
    head_dim=32,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    tie_word_embeddings=True,
    max_position_embeddings=1024,
    bos_token_id=0,
    eos_token_ids=(1,),
)
_TOKENIZER_STORIES = 5000
_HELD_OUT_SEED_OFFSET = 1_000_000
_HELD_OUT_BATCHES = 16
_PROMPTS = ("Once upon a time", "The old fisherman", "Tell me a story about a storm.")
_SAMPLE_TOKENS = 256
_TEMPERATURE = 0.7

_MODEL_CARD = """\
---
license: apache-2.0
language: en
---
# The demo checkpoint of jpaged

A Llama-style decoder of {num_params:,} parameters, stored in bfloat16, with a byte-level BPE
tokenizer of {vocab_size} tokens. It writes short and simple English stories, and exists so that
jpaged can be tried without a download:

    make generate PROMPT="{prompt}"

It knows little else. Do not rely on anything that it states as a fact.

## Training

Trained from scratch on {train_tokens:,} tokens that `scripts/demo/corpus.py` wrote: tales,
fables, letters, descriptions, how-tos and facts, put together from templates by a seeded random
generator.
No other text was used. The command was

    {command}

and {steps} steps took {minutes:.0f} minutes on {cores} CPU cores ({backend} backend). Text longer
than {context} tokens is longer than any sequence it was trained on.

## Evaluation

Nats per token on {held_out_tokens:,} tokens of stories from another seed. They share the templates
of the training stories, so the loss tells how well the generator was learned, not English:

| | held-out loss |
|---|---|
| this checkpoint | {loss:.3f} |
| unigram frequencies of the training tokens | {unigram_loss:.3f} |

## Samples

At temperature {temperature}, the first that the training run drew for each of three prompts:

{samples}
## Licence

Apache-2.0: the weights, the tokenizer and the generator of the corpus.
"""


def main(argv: list[str]) -> None:
    """Trains the tokenizer and the model, reports on them and saves both."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # Orbax describes every step of saving otherwise
    started = time.monotonic()
    tokenizer = train_tokenizer(
        itertools.islice(stories(_SEED.value), _TOKENIZER_STORIES), _CONFIG.vocab_size
    )
    long_shape = max(_BATCH_SIZE.value // 2, 1), 2 * _SEQ_LEN.value
    held_out_texts = stories(_SEED.value + _HELD_OUT_SEED_OFFSET)
    held_out = list(
        itertools.islice(_batches(tokenizer, held_out_texts, long_shape), _HELD_OUT_BATCHES)
    )

    decoder = Decoder(_CONFIG)
    evaluate = functools.partial(_mean_loss, jax.jit(_loss_fn(decoder)), held_out)
    state, token_counts = _train(decoder, tokenizer, long_shape, evaluate)
    # What is shipped is what is judged: the weights as bfloat16 rounds them.
    shipped = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), state.params)
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), shipped)
    loss = evaluate(params)
    unigram_loss = _unigram_loss(token_counts, held_out)
    print(f"held-out loss {loss:.3f}, unigram baseline {unigram_loss:.3f} nats per token")
    samples = _sample(decoder, params, tokenizer)
    for sample in samples:
        print(f"\n{sample}")

    output = pathlib.Path(_OUTPUT.value)
    save_orbax(output, _CONFIG, shipped)
    # Orbax notes in this file where the checkpoint was written, and loads without it.
    (output / "params" / "commit_success.txt").unlink(missing_ok=True)
    tokenizer.save(str(output / "tokenizer.json"))
    card = _MODEL_CARD.format(
        num_params=decoder.num_params,
        vocab_size=_CONFIG.vocab_size,
        prompt=_PROMPTS[1],
        train_tokens=int(token_counts.sum()),
        command=shlex.join(["python", "-m", "jpaged.scripts.demo.train_demo", *sys.argv[1:]]),
        steps=_STEPS.value,
        minutes=(time.monotonic() - started) / 60,
        cores=os.cpu_count(),
        backend=jax.default_backend(),
        context=long_shape[1],
        held_out_tokens=sum(batch.size for batch in held_out),
        loss=loss,
        unigram_loss=unigram_loss,
        temperature=_TEMPERATURE,
        samples="\n".join(_quoted(sample) for sample in samples),
    )
    (output / "MODEL_CARD.md").write_text(card)


def _train(
    decoder: Decoder,
    tokenizer: Tokenizer,
    long_shape: tuple[int, int],
    evaluate: Callable[[Params], float],
) -> tuple[TrainState, np.ndarray]:
    """Returns the final state, and how often each token occurred in training."""
    state = TrainState.create(
        apply_fn=decoder.apply_dense,
        params=decoder.init(jax.random.key(_SEED.value)),
        tx=_optimizer(),
    )
    loss_fn = _loss_fn(decoder)

    def step_fn(state: TrainState, tokens: jax.Array) -> tuple[TrainState, jax.Array]:
        loss, grads = jax.value_and_grad(loss_fn)(state.params, tokens)
        return state.apply_gradients(grads=grads), loss

    train_step = jax.jit(step_fn, donate_argnums=0)
    texts = stories(_SEED.value)
    short_steps = max(_STEPS.value - _LONG_STEPS.value, 0)
    batches = itertools.chain(
        itertools.islice(
            _batches(tokenizer, texts, (_BATCH_SIZE.value, _SEQ_LEN.value)), short_steps
        ),
        _batches(tokenizer, texts, long_shape),
    )
    token_counts = np.zeros(decoder.config.vocab_size, np.int64)
    with tqdm(itertools.islice(batches, _STEPS.value), total=_STEPS.value, unit="step") as progress:
        for step, tokens in enumerate(progress, 1):
            token_counts += np.bincount(tokens.ravel(), minlength=token_counts.size)
            state, loss = train_step(state, tokens)
            if step % 10 == 0:
                progress.set_postfix(loss=f"{loss:.3f}")
            if step % _EVAL_EVERY.value == 0:
                progress.write(f"step {step}: held-out loss {evaluate(state.params):.3f}")
    return state, token_counts


def _optimizer() -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=_LEARNING_RATE.value,
        warmup_steps=min(_WARMUP_STEPS.value, _STEPS.value - 1),
        decay_steps=_STEPS.value,
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            schedule,
            b2=0.95,
            weight_decay=_WEIGHT_DECAY.value,
            mask=lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params),
        ),
    )


def _batches(
    tokenizer: Tokenizer, texts: Iterator[str], shape: tuple[int, int]
) -> Iterator[np.ndarray]:
    """Packs documents end to end, each between `BOS` and `EOS`, into i32[batch_size, seq_len]."""
    eos = tokenizer.token_to_id(EOS)
    size = shape[0] * shape[1]
    tokens: list[int] = []
    for text in texts:
        tokens += [*tokenizer.encode(text).ids, eos]
        while len(tokens) >= size:
            yield np.array(tokens[:size], np.int32).reshape(shape)
            tokens = tokens[size:]


def _loss_fn(decoder: Decoder) -> Callable[[Params, jax.Array], jax.Array]:
    def loss_fn(params: Params, tokens: jax.Array) -> jax.Array:
        logits = decoder.apply_dense(params, tokens)[:, :-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.mean(losses)

    return loss_fn


def _mean_loss(loss_fn: Callable, batches: list[np.ndarray], params: Params) -> float:
    return float(np.mean([loss_fn(params, tokens) for tokens in batches]))


def _unigram_loss(token_counts: np.ndarray, batches: list[np.ndarray]) -> float:
    """Nats per token of the training tokens' frequencies, each count raised by one."""
    log_probs = np.log(token_counts + 1) - np.log(np.sum(token_counts + 1))
    targets = np.concatenate([tokens[:, 1:].ravel() for tokens in batches])
    return float(-np.mean(log_probs[targets]))


def _sample(decoder: Decoder, params: Params, tokenizer: Tokenizer) -> list[str]:
    """Continues each of `_PROMPTS`."""

    @jax.jit
    def next_token(tokens: jax.Array, length: int, key: jax.Array) -> jax.Array:
        logits = decoder.apply_dense(params, tokens)[:, length - 1]
        return jax.random.categorical(key, logits / _TEMPERATURE)[0]

    eos = tokenizer.token_to_id(EOS)
    key = jax.random.key(_SEED.value)
    texts = []
    for i, prompt in enumerate(_PROMPTS):
        ids = tokenizer.encode(prompt).ids
        while len(ids) < _SAMPLE_TOKENS and ids[-1] != eos:
            # One shape for every length: what lies beyond the end is masked by causality.
            padded = np.zeros((1, _SAMPLE_TOKENS), np.int32)
            padded[0, : len(ids)] = ids
            token_key = jax.random.fold_in(jax.random.fold_in(key, i), len(ids))
            ids.append(int(next_token(padded, len(ids), token_key)))
        texts.append(tokenizer.decode(ids))
    return texts


def _quoted(text: str) -> str:
    """A Markdown quotation with the text's line breaks."""
    return "\n".join(f"> {line}".rstrip() for line in text.split("\n")) + "\n"


if __name__ == "__main__":
    app.run(main)
