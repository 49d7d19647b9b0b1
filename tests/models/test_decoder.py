# SPDX-License-Identifier: Apache-2.0
"""The decoder beside a float64 one that is written here with loops, and beside recordings."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from jpaged.models import checkpoint
from jpaged.models.decoder import Decoder, stack_layers
from jpaged.models.inputs import PagedInputs
from jpaged.models.layers import linear
from jpaged.pallas_kernels.rows import Rows
from tests import tolerances

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hf"
# Other families: see test_families.py.
ALL = [
    "llama3_rope_hd80_tied",
    "llama_gqa5_hd48_untied",
    "llama_linear_rope_mqa",
    "qwen3_gqa5_hd48_tied",
    "qwen3_mha_hd80_untied_sharded",
]
# Halves the time to compile. Optimised programs are held to the same recordings in test_engine.py.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

LLAMA, QWEN = "llama3_rope_hd80_tied", "qwen3_gqa5_hd48_tied"


class TestLinear:
    """Few and many tokens are multiplied in a different order on CPU."""

    @pytest.mark.parametrize("tokens", [1, 16, 256, 257])
    def test_is_the_product(self, tokens):
        rng = np.random.default_rng(tokens)
        x = rng.standard_normal((tokens, 40)).astype(np.float32)
        weight = rng.standard_normal((24, 40)).astype(np.float32)
        got = np.asarray(linear(x, weight))
        want = x.astype(np.float64) @ weight.T.astype(np.float64)
        # Higham 2002, (3.5), for sums of 40 products in any order.
        bound = 1.01 * 40 * 2.0**-24 * (np.abs(x) @ np.abs(weight).T)
        assert (np.abs(got - want) <= bound).all()

    def test_has_the_dtype_that_is_asked_for(self):
        x, weight = jnp.ones((3, 4), jnp.bfloat16), jnp.full((2, 4), 1.01, jnp.bfloat16)
        assert linear(x, weight).dtype == jnp.bfloat16
        assert linear(x, weight, jnp.float32).dtype == jnp.float32

    @pytest.mark.parametrize("platform", ["tpu", "cuda"])
    def test_other_compilers_choose_the_order_themselves(self, platform):
        x, weight = jnp.ones((16, 40)), jnp.ones((24, 40))
        lowered = jax.jit(linear).trace(x, weight).lower(lowering_platforms=(platform,))
        assert "dot_general" in lowered.as_text()
        assert "optimization_barrier" not in lowered.as_text()

    @pytest.mark.parametrize("tokens", [256, 257])
    def test_a_cpu_keeps_the_order_for_few_tokens(self, tokens):
        lowered = jax.jit(linear).lower(jnp.ones((tokens, 40)), jnp.ones((24, 40)))
        assert ("optimization_barrier" in lowered.as_text()) == (tokens == 256)

    @pytest.mark.parametrize("tokens", [16, 64, 256, 512])
    @pytest.mark.parametrize("sizes", [(576, 1536), (1536, 576)])
    def test_tokens_do_not_influence_each_other(self, tokens, sizes):
        """Deterministic engines rest on it: the bits follow a token wherever it stands."""
        rng = np.random.default_rng(tokens)
        x = rng.standard_normal((tokens, sizes[1])).astype(np.float32)
        weight = rng.standard_normal(sizes).astype(np.float32)
        order = rng.permutation(tokens)
        others = np.where(np.arange(tokens)[:, None] % 2, x, 1e3)
        whole = np.asarray(linear(x, weight))
        np.testing.assert_array_equal(linear(x[order], weight), whole[order])
        np.testing.assert_array_equal(linear(others, weight)[1::2], whole[1::2])

    def test_can_be_differentiated(self):
        x, weight = jnp.ones((3, 4)), jnp.arange(8.0).reshape(2, 4)
        np.testing.assert_array_equal(
            jax.grad(lambda x: linear(x, weight).sum())(x), np.tile(weight.sum(axis=0), (3, 1))
        )


class NaiveDecoder:
    """Reads Hugging Face's own files; every head of every layer in turn, all in float64."""

    def __init__(self, directory):
        self.config = json.loads((directory / "config.json").read_text())
        self.tensors = {}
        for file in directory.glob("*.safetensors"):
            self.tensors |= safetensors.numpy.load_file(file)
        self.tensors = {name: x.astype(np.float64) for name, x in self.tensors.items()}

    def norm(self, x, name):
        mean_square = (x**2).mean(axis=-1, keepdims=True)
        return x / np.sqrt(mean_square + self.config["rms_norm_eps"]) * self.tensors[name]

    def rotation(self, num_tokens, head_dim):
        """complex[num_tokens, head_dim / 2]: what turns each pair of lanes at each position."""
        rope = self.config["rope_parameters"]
        turns = np.zeros(head_dim // 2)
        for i in range(head_dim // 2):
            frequency = rope["rope_theta"] ** (-2 * i / head_dim)
            if rope["rope_type"] == "linear":
                frequency /= rope["factor"]
            elif rope["rope_type"] == "llama3":
                context = rope["original_max_position_embeddings"]
                wavelength = 2 * np.pi / frequency
                if wavelength > context / rope["low_freq_factor"]:
                    frequency /= rope["factor"]
                elif wavelength >= context / rope["high_freq_factor"]:
                    smooth = (context / wavelength - rope["low_freq_factor"]) / (
                        rope["high_freq_factor"] - rope["low_freq_factor"]
                    )
                    frequency = (1 - smooth) * frequency / rope["factor"] + smooth * frequency
            turns[i] = frequency
        return np.exp(1j * np.arange(num_tokens)[:, None] * turns)

    def attention(self, x, prefix):
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        head_dim = self.config["head_dim"]
        rotation = self.rotation(len(x), head_dim)

        def project(part, count):
            y = x @ self.tensors[f"{prefix}{part}_proj.weight"].T
            return [y[:, i * head_dim : (i + 1) * head_dim] for i in range(count)]

        def prepare(head, part):
            if self.config["model_type"] == "qwen3":
                head = self.norm(head, f"{prefix}{part}_norm.weight")
            half = head_dim // 2
            turned = (head[:, :half] + 1j * head[:, half:]) * rotation
            return np.concatenate([turned.real, turned.imag], axis=1)

        queries = [prepare(head, "q") for head in project("q", heads)]
        keys = [self.stored(prepare(head, "k"), prefix, 0) for head in project("k", kv_heads)]
        values = [self.stored(head, prefix, 1) for head in project("v", kv_heads)]
        outs = []
        for i, query in enumerate(queries):
            key, value = keys[i * kv_heads // heads], values[i * kv_heads // heads]
            out = np.zeros_like(query)
            for t in range(len(x)):
                scores = key[: t + 1] @ query[t] / np.sqrt(head_dim)
                weights = np.exp(scores - scores.max())
                out[t] = weights / weights.sum() @ value[: t + 1]
            outs.append(out)
        return np.concatenate(outs, axis=1) @ self.tensors[f"{prefix}o_proj.weight"].T

    def stored(self, head, prefix, part):
        """What a cache gives back of the keys, or values, of a head."""
        del prefix, part
        return head

    def mlp(self, x, prefix):
        gate = x @ self.tensors[f"{prefix}gate_proj.weight"].T
        up = x @ self.tensors[f"{prefix}up_proj.weight"].T
        return (gate / (1 + np.exp(-gate)) * up) @ self.tensors[f"{prefix}down_proj.weight"].T

    def logits(self, token_ids):
        """float64[num_tokens, vocab_size]."""
        x = self.tensors["model.embed_tokens.weight"][token_ids]
        for i in range(self.config["num_hidden_layers"]):
            layer = f"model.layers.{i}."
            normed = self.norm(x, f"{layer}input_layernorm.weight")
            x = x + self.attention(normed, f"{layer}self_attn.")
            normed = self.norm(x, f"{layer}post_attention_layernorm.weight")
            x = x + self.mlp(normed, f"{layer}mlp.")
        head = "model.embed_tokens" if self.config["tie_word_embeddings"] else "lm_head"
        return self.norm(x, "model.norm.weight") @ self.tensors[f"{head}.weight"].T


@functools.cache
def load(name):
    """The naive decoder, the config and the parameters of a fixture."""
    return NaiveDecoder(FIXTURES / name), *checkpoint.load(FIXTURES / name, jnp.float32)


@functools.cache
def expected(name):
    return json.loads((FIXTURES / name / "expected.json").read_text())


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def close(left, right, atol=tolerances.LOGPROB):
    """Compares logits as log-probabilities, and as they are."""
    np.testing.assert_allclose(log_softmax(left), log_softmax(right), atol=atol, rtol=0)
    np.testing.assert_allclose(left, right, atol=atol, rtol=0)


@functools.cache
def jitted_apply(config, scan_layers):
    decoder = Decoder(config, scan_layers=scan_layers, backend="xla")
    return jit(decoder.apply, donate_argnums=2)


class Pages:
    """Sequences in a pool of pages, stepped by hand; whatever is not theirs is NaN or nonsense.

    There are two shapes of steps only, one for decode, so that few programs are compiled.
    """

    NUM_PAGES, PAGE_SIZE, PAGES_PER_SEQ, ROWS, TOKENS = 64, 4, 16, 4, 48

    def __init__(self, config, params, prompts, *, scan_layers=False, kv_dtype=None):
        self.prompts, self.params = prompts, params
        self.done = [0] * len(prompts)
        rng = np.random.default_rng(7)
        free = list(rng.permutation(np.arange(1, self.NUM_PAGES)))
        # Entries past a sequence's last page point at any page.
        table_shape = (len(prompts), self.PAGES_PER_SEQ)
        self.tables = rng.integers(0, self.NUM_PAGES, table_shape).astype(np.int32)
        for table, prompt in zip(self.tables, prompts, strict=True):
            for i in range(-(-len(prompt) // self.PAGE_SIZE)):
                table[i] = free.pop()
        pages = (config.num_layers, self.NUM_PAGES, config.num_kv_heads, self.PAGE_SIZE)
        kv_dtype = kv_dtype or params["embedding"].dtype
        nonsense = 127 if kv_dtype == "int8" else jnp.nan
        self.pool = jnp.full((*pages, 2 * config.head_dim), nonsense, kv_dtype)
        self.apply = jitted_apply(config, scan_layers)

    def step(self, *counts, samples=None):
        """Runs `counts[i]` more tokens of sequence i, padded; the logits of each one's last token.

        `samples`: other tokens of the step, whose logits to return instead.
        """
        live = [i for i, count in enumerate(counts) if count]
        num_tokens = self.ROWS if sum(counts) <= self.ROWS else self.TOKENS
        assert len(live) <= self.ROWS and sum(counts) <= num_tokens
        inputs = {
            "token_ids": np.full(num_tokens, 5, np.int32),
            "positions": np.full(num_tokens, 10**6, np.int32),
            "logits_indices": np.zeros(self.ROWS, np.int32),
        }
        rows = {
            "page_table": np.zeros((self.ROWS, self.PAGES_PER_SEQ), np.int32),
            "kv_lens": np.full(self.ROWS, 3, np.int32),
            "cu_q_lens": np.full(self.ROWS + 1, sum(counts), np.int32),
            "num_seqs": np.array([len(live)], np.int32),
        }
        token = 0
        for row, i in enumerate(live):
            start, end = self.done[i], self.done[i] + counts[i]
            inputs["token_ids"][token : token + counts[i]] = self.prompts[i][start:end]
            inputs["positions"][token : token + counts[i]] = np.arange(start, end)
            rows["page_table"][row] = self.tables[i]
            rows["kv_lens"][row] = end
            rows["cu_q_lens"][row] = token
            self.done[i] = end
            token += counts[i]
        if samples is None:
            samples = rows["cu_q_lens"][1 : len(live) + 1] - 1
        inputs["logits_indices"][: len(samples)] = samples
        step = jax.tree.map(jnp.asarray, PagedInputs(rows=Rows(**rows), **inputs))
        logits, self.pool = self.apply(self.params, step, self.pool)
        assert logits.dtype == jnp.float32
        return np.asarray(logits)[: len(samples)]

    def cells(self, i):
        """[num_layers, tokens so far, num_kv_heads, 2 * head_dim] of sequence i."""
        cells = np.asarray(self.pool)[:, self.tables[i]].swapaxes(2, 3)
        return cells.reshape(cells.shape[0], -1, *cells.shape[3:])[:, : self.done[i]]


class TestOracle:
    """The naive decoder is itself held to what transformers computed."""

    @pytest.mark.parametrize("name", ALL)
    def test_recorded_log_probabilities(self, name):
        naive, _, _ = load(name)
        for recorded in expected(name)["top_logprobs"]:
            prompt = expected(name)["prompts"][recorded["prompt"]]
            tokens = prompt + expected(name)["continuations"][recorded["prompt"]]
            got = log_softmax(naive.logits(tokens[:-1]))[len(prompt) - 1 :]
            got = np.take_along_axis(got, np.array(recorded["token_ids"]), axis=-1)
            np.testing.assert_allclose(got, recorded["logprobs"], atol=tolerances.LOGPROB, rtol=0)

    @pytest.mark.parametrize("name", [LLAMA, QWEN])
    def test_greedy_continuation(self, name):
        naive, _, _ = load(name)
        for i in range(1, 5):
            tokens = list(expected(name)["prompts"][i])
            for want in expected(name)["continuations"][i][:6]:
                tokens.append(int(naive.logits(tokens)[-1].argmax()))
                assert tokens[-1] == want


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in (LLAMA, QWEN)
        else pytest.param(name, marks=(pytest.mark.nightly, pytest.mark.slow))
        for name in ALL
    ],
)
class TestLogits:
    def test_dense(self, name):
        naive, config, params = load(name)
        rng = np.random.default_rng(0)
        tokens = rng.integers(0, config.vocab_size, (2, 40))
        logits = jit(Decoder(config).apply_dense)(params, jnp.asarray(tokens, jnp.int32))
        assert logits.dtype == jnp.float32
        for row in range(2):
            close(logits[row], naive.logits(tokens[row]))

    def test_paged(self, name):
        """Prompts in uneven chunks beside one another, then decode steps, in pages of NaN."""
        naive, config, params = load(name)
        rng = np.random.default_rng(1)
        prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (38, 11, 5)]
        want = [naive.logits(prompt) for prompt in prompts]
        pages = Pages(config, params, prompts)
        steps = [(5, 7, 0), (20, 1, 1), (12, 2, 3)]
        for counts in steps:
            logits = pages.step(*counts)
            live = [i for i in range(3) if counts[i]]
            close(logits, np.stack([want[i][pages.done[i] - 1] for i in live]))
        # A step of as many tokens as rows.
        assert pages.done == [37, 10, 4]
        logits = pages.step(1, 1, 1)
        close(logits, np.stack([want[i][-1] for i in range(3)]))

    def test_greedy_continuation(self, name):
        """The recorded tokens, one step at a time on the cache."""
        _, config, params = load(name)
        prompts = expected(name)["prompts"][1:5]
        wants = expected(name)["continuations"][1:5]
        pages = Pages(config, params, [p + w for p, w in zip(prompts, wants, strict=True)])
        logits = pages.step(*map(len, prompts))
        for i in range(6):
            assert logits.argmax(axis=-1).tolist() == [want[i] for want in wants]
            logits = pages.step(1, 1, 1, 1)


class TestChunks:
    @pytest.mark.parametrize("name", [LLAMA, QWEN])
    def test_chunks_of_a_prompt_equal_the_whole(self, name):
        _, config, params = load(name)
        prompt = np.random.default_rng(2).integers(0, config.vocab_size, 45).tolist()
        whole = Pages(config, params, [prompt])
        want = whole.step(45)
        for chunks in ([1] * 3 + [42], [44, 1], [31, 14], [7, 26, 12]):
            pages = Pages(config, params, [prompt])
            for count in chunks:
                logits = pages.step(count)
            close(logits, want)
            np.testing.assert_allclose(pages.cells(0), whole.cells(0), atol=tolerances.LOGPROB)

    def test_other_sequences_make_no_difference(self):
        _, config, params = load(LLAMA)
        rng = np.random.default_rng(3)
        prompts = [rng.integers(0, config.vocab_size, n).tolist() for n in (9, 20, 6)]
        together = Pages(config, params, prompts)
        logits = together.step(9, 20, 6)
        for i, prompt in enumerate(prompts):
            alone = Pages(config, params, [prompt])
            close(alone.step(len(prompt)), logits[i : i + 1])

    def test_logits_of_the_tokens_that_are_asked_for(self):
        """In any order, repeated, in the middle of a prompt."""
        naive, config, params = load(QWEN)
        prompts = [[3, 1, 4, 1, 5], [9, 2, 6]]
        want = np.concatenate([naive.logits(prompt) for prompt in prompts])
        samples = [6, 0, 3, 3]
        pages = Pages(config, params, prompts)
        logits = pages.step(5, 3, samples=samples)
        close(logits, want[samples])

    def test_nothing_but_the_sequences_cells_is_written(self):
        _, config, params = load(QWEN)
        pages = Pages(config, params, [[1, 2, 3, 4, 5, 6], [7, 8]])
        pages.step(6, 2)
        written = np.isfinite(np.asarray(pages.pool)).all(axis=(0, 2, 4))
        want = np.zeros_like(written)
        for i, count in enumerate((6, 2)):
            for position in range(count):
                want[pages.tables[i][position // 4], position % 4] = True
        np.testing.assert_array_equal(written, want)
        np.testing.assert_array_equal(np.isnan(pages.pool).any(axis=(0, 2, 4)), ~want)


class TestScan:
    @pytest.mark.parametrize("name", ["llama_linear_rope_mqa", QWEN])
    def test_equals_unrolled(self, name):
        """The same numbers in the same order but for what the compiler fuses: a few roundings."""
        _, config, params = load(name)
        prompts = [[5, 17, 23, 2, 81, 40, 11, 9, 77, 30], [3, 3, 60]]
        unrolled = Pages(config, params, prompts)
        scanned = Pages(config, stack_layers(params, config), prompts, scan_layers=True)
        for counts in ((6, 2), (4, 1)):
            close(scanned.step(*counts), unrolled.step(*counts), atol=5e-5)
        for i in range(2):
            np.testing.assert_allclose(scanned.cells(i), unrolled.cells(i), atol=5e-5)

    def test_stack_layers(self):
        _, config, params = load("llama_linear_rope_mqa")
        stacked = stack_layers(params, config)
        assert set(stacked) == {"embedding", "final_norm", "lm_head", "layers"}
        for i in range(3):
            layer = jax.tree.map(lambda x, i=i: x[i], stacked["layers"]["0"])
            jax.tree.map(np.testing.assert_array_equal, layer, params[f"layers_{i}"])

    def test_init_makes_the_tree_that_apply_takes(self):
        _, config, params = load(QWEN)
        shape = functools.partial(jax.tree.map, lambda x: (x.shape, x.dtype))
        scanned = Decoder(config, scan_layers=True)
        assert shape(scanned.abstract_params()) == shape(stack_layers(params, config))
        assert shape(Decoder(config).abstract_params()) == shape(params)


def relative_error(logits, want):
    return np.sqrt(np.mean((logits - want) ** 2) / np.mean(want**2))


class TestDtype:
    """Near the float32 model, not equal to it.

    Each of about 20 roundings of the residual stream adds half an epsilon at most.
    """

    @pytest.mark.parametrize(
        ("dtype", "scan_layers"), [(jnp.bfloat16, False), (jnp.float16, True)], ids=["bf16", "f16"]
    )
    def test_paged(self, dtype, scan_layers):
        naive, config, params = load(QWEN)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        if scan_layers:
            params = stack_layers(params, config)
        prompt = list(range(20))
        pages = Pages(config, params, [prompt], scan_layers=scan_layers)
        samples = [0, 7, 12, 19]
        logits = pages.step(20, samples=samples)
        assert pages.pool.dtype == dtype
        error = relative_error(logits, naive.logits(prompt)[samples])
        assert 1e-5 < error < 20 * float(jnp.finfo(dtype).eps) / 2

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
    def test_dense(self, dtype):
        naive, config, params = load(QWEN)
        params = jax.tree.map(lambda x: x.astype(dtype), params)
        tokens = jnp.arange(20, dtype=jnp.int32)[None]
        logits = jit(Decoder(config).apply_dense)(params, tokens)
        assert logits.dtype == jnp.float32
        error = relative_error(logits[0], naive.logits(list(range(20))))
        assert 1e-5 < error < 20 * float(jnp.finfo(dtype).eps) / 2

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16], ids=["bf16", "f16"])
    @pytest.mark.parametrize("scan_layers", [False, True], ids=["unrolled", "scanned"])
    def test_params(self, dtype, scan_layers):
        _, config, _ = load(QWEN)
        params = Decoder(config, scan_layers=scan_layers).abstract_params(dtype)
        assert {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype(dtype)}


class TestParams:
    @pytest.mark.parametrize("name", ALL)
    def test_count(self, name):
        _, config, params = load(name)
        assert Decoder(config).num_params == sum(x.size for x in jax.tree.leaves(params))

    def test_kv_bytes(self):
        _, config, params = load("llama_linear_rope_mqa")
        pages = Pages(config, params, [[1]])
        tokens = pages.NUM_PAGES * pages.PAGE_SIZE
        assert config.kv_bytes_per_token(4) * tokens == pages.pool.nbytes

    def test_init_is_small_and_depends_on_the_key(self):
        _, config, _ = load(QWEN)
        init = jit(Decoder(dataclasses.replace(config, num_layers=1)).init)
        one, other = (init(jax.random.key(seed)) for seed in (0, 1))
        assert 0.015 < float(one["embedding"].std()) < 0.025
        assert float(abs(one["embedding"] - other["embedding"]).max()) > 0.01
        np.testing.assert_array_equal(one["final_norm"]["scale"], 1)


@functools.cache
def gradients(name):
    """Some tokens, and the gradient of their loss."""
    _, config, params = load(name)
    tokens = np.random.default_rng(4).integers(0, config.vocab_size, 12)

    def loss(params):
        logits = Decoder(config).apply_dense(params, jnp.asarray(tokens[None, :-1], jnp.int32))
        logprobs = jax.nn.log_softmax(logits[0])
        return -jnp.take_along_axis(logprobs, jnp.asarray(tokens[1:, None]), axis=1).mean()

    return tokens, jit(jax.grad(loss))(params)


@pytest.mark.parametrize(
    ("name", "path", "hf_name"),
    [
        (LLAMA, ("layers_0", "attention", "k_proj", "weight"), "model.layers.0.self_attn.k_proj"),
        (QWEN, ("layers_1", "attention", "q_norm", "scale"), "model.layers.1.self_attn.q_norm"),
        (LLAMA, ("embedding",), "model.embed_tokens"),
    ],
    ids=["k_proj", "q_norm", "tied embedding"],
)
def test_gradient_of_dense(name, path, hf_name):
    """Beside the slope of the naive decoder's loss along a random direction."""
    naive, _, _ = load(name)
    tokens, gradient = gradients(name)
    for key in path:
        gradient = gradient[key]

    original = naive.tensors[f"{hf_name}.weight"]
    direction = np.random.default_rng(5).standard_normal(original.shape)
    direction /= np.linalg.norm(direction)

    def naive_loss(step):
        naive.tensors[f"{hf_name}.weight"] = original + step * direction
        try:
            logprobs = log_softmax(naive.logits(tokens[:-1]))
        finally:
            naive.tensors[f"{hf_name}.weight"] = original
        return -logprobs[np.arange(len(tokens) - 1), tokens[1:]].mean()

    slope = (naive_loss(1e-5) - naive_loss(-1e-5)) / 2e-5
    assert abs(slope) > 1e-4
    np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), slope, rtol=2e-3)


@pytest.mark.parametrize(
    ("scan_layers", "num_tokens"), [(False, 4), (True, 64)], ids=["unrolled", "scanned"]
)
def test_a_donated_step_holds_one_pool(scan_layers, num_tokens):
    _, config, params = load("llama_linear_rope_mqa")
    params = stack_layers(params, config) if scan_layers else params
    shape = (config.num_layers, 40_000, config.num_kv_heads, 16, 2 * config.head_dim)
    pool = jax.ShapeDtypeStruct(shape, jnp.float32)
    pool_bytes = int(np.prod(shape)) * 4
    ints = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
    inputs = PagedInputs(
        token_ids=ints((num_tokens,)),
        positions=ints((num_tokens,)),
        rows=Rows(ints((4, 64)), ints((4,)), ints((5,)), ints((1,))),
        logits_indices=ints((4,)),
    )
    apply = Decoder(config, scan_layers=scan_layers, backend="xla").apply
    compiled = jax.jit(apply, donate_argnums=2).lower(params, inputs, pool).compile()
    memory = compiled.memory_analysis()
    assert memory.alias_size_in_bytes == pool_bytes
    assert memory.temp_size_in_bytes < pool_bytes / 50
