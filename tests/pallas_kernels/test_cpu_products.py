# SPDX-License-Identifier: Apache-2.0
"""Products on CPUs: against float64, and to the last bit against themselves in other company."""

import concurrent.futures
import functools
import hashlib
import json
import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.models.layers import linear
from jpaged.pallas_kernels.cpu import products
from jpaged.pallas_kernels.cpu.chip import Chip, host_chip
from jpaged.pallas_kernels.cpu.compiled import Compiled

HOST = host_chip()
pytestmark = pytest.mark.skipif(HOST is None, reason="no kernels for this processor")

CHIPS = {"host": HOST}
if platform.machine() in ("x86_64", "AMD64"):
    # That this processor is too, at least. The last has sums for more registers than there are.
    CHIPS |= {
        "avx2": Chip(8, 3, 3, "haswell", "+avx2,+fma"),
        "128-bit": Chip(4, 5, 4, "haswell", "+avx2,+fma"),
    }

TOKENS = [*range(1, 18), 31, 64]
# Of one vector, and of blocks: one, the longest one, two of which the last is shorter, several.
INPUTS = {"vector": 16, "block": 256, "longest": 768, "uneven": 784, "two": 1024, "three": 2320}
# Whole tiles of 3 and 5 rows, a row and two beside them, less than a tile; pieces of one thread
# and of many.
FEATURES = [1, 2, 15, 16, 47, 121, 480]


@functools.cache
def kernel(chip):
    """The product of a processor, as XLA calls it."""
    compiled = Compiled(products.product_module(chip), chip)
    target = f"test_product_{len(_kept)}"
    _kept.append(compiled)
    compiled.register("product", target)

    @jax.jit
    def call(x, weight):
        shape = jax.ShapeDtypeStruct((x.shape[0], weight.shape[0]), jnp.float32)
        return jax.ffi.ffi_call(target, shape)(x, weight)

    return lambda x, weight: np.asarray(call(x, weight))


_kept = []  # what XLA calls must live as long as it may


def normal(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).standard_normal(shape, np.float32)


def bound(x, weight, lanes):
    """How far from the product a sum in each of `lanes`, and their sum, may end by rounding."""
    adds = x.shape[1] // lanes + lanes.bit_length()
    return adds * 2.0**-24 * (np.abs(x, dtype=np.float64) @ np.abs(weight.T, dtype=np.float64))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
@pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
class TestAgainstFloat64:
    @pytest.mark.parametrize("features", FEATURES)
    def test_whole_numbers_are_exact(self, chip, inputs, features):
        rng = np.random.default_rng((inputs, features))
        weight = rng.integers(-30, 31, (features, inputs)).astype(np.float32)
        # The most tokens that the kernel is given of so many inputs, too.
        for tokens in {*TOKENS[:: 1 if features < 100 else 5], products.MOST_NUMBERS // inputs}:
            x = rng.integers(-30, 31, (tokens, inputs)).astype(np.float32)
            want = x.astype(np.float64) @ weight.astype(np.float64).T
            np.testing.assert_array_equal(kernel(chip)(x, weight), want, err_msg=f"{tokens}")

    @pytest.mark.parametrize("scale", [1e-18, 1.0, 1e15], ids="{:g}".format)
    def test_rounding_is_that_of_its_sums(self, chip, inputs, scale):
        x, weight = normal(9, inputs) * np.float32(scale), normal(47, inputs, seed=1)
        want = x.astype(np.float64) @ weight.astype(np.float64).T
        off = np.abs(kernel(chip)(x, weight) - want) / bound(x, weight, chip.lanes)
        assert 0 < off.max() < 1  # that it rounds at all says that it is not 0 by 0


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
class TestTokens:
    @pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
    def test_bits_are_the_same_in_any_company(self, chip, inputs):
        most = products.MOST_NUMBERS // inputs
        x, weight = normal(min(most, 70), inputs), normal(203, inputs, seed=1)
        alone = np.concatenate([kernel(chip)(row[None], weight) for row in x])
        for tokens in (*TOKENS, len(x)):
            for first in (0, (len(x) - tokens) // 2, len(x) - tokens):
                if first >= 0:
                    together = kernel(chip)(x[first : first + tokens], weight)
                    np.testing.assert_array_equal(together, alone[first : first + tokens])

    @pytest.mark.parametrize("inputs", INPUTS.values(), ids=INPUTS)
    def test_bits_are_the_same_in_any_tile(self, chip, inputs):
        x, weight = normal(13, inputs), normal(203, inputs, seed=1)
        want = kernel(chip)(x, weight)
        for rows, tokens in ((1, 1), (2, 3), (4, 2)):
            other = Chip(chip.lanes, rows, tokens, chip.cpu, chip.features)
            np.testing.assert_array_equal(kernel(other)(x, weight), want)
        # A row of weights on its own, and in another place among the others.
        for row in (0, 101, 202):
            np.testing.assert_array_equal(
                kernel(chip)(x, weight[row : row + 1]), want[:, row : row + 1]
            )
        np.testing.assert_array_equal(kernel(chip)(x, weight[::-1]), want[:, ::-1])

    def test_what_is_no_number_stays_in_its_token(self, chip):
        x, weight = normal(11, 784), normal(23, 784, seed=1)
        clean = kernel(chip)(x, weight)
        x[2, 5], x[7, 783], x[9, 400] = np.nan, np.inf, -np.inf
        x[4] = 0
        got = kernel(chip)(x, weight)
        assert np.isnan(got[2]).all()
        np.testing.assert_array_equal(got[7], np.inf * np.sign(weight[:, 783]))
        np.testing.assert_array_equal(got[9], -np.inf * np.sign(weight[:, 400]))
        assert not got[4].any()
        others = [0, 1, 3, 5, 6, 8, 10]
        np.testing.assert_array_equal(got[others], clean[others])

    def test_what_is_no_number_stays_in_its_feature(self, chip):
        x, weight = normal(7, 784), normal(23, 784, seed=1)
        clean = kernel(chip)(x, weight)
        weight[[3, 22], [0, 783]] = np.nan
        got = kernel(chip)(x, weight)
        assert np.isnan(got[:, [3, 22]]).all()
        others = [feature for feature in range(23) if feature not in (3, 22)]
        np.testing.assert_array_equal(got[:, others], clean[:, others])


class TestTakes:
    X, WEIGHT = (4, 64), (24, 64)

    def test_what_it_is_for(self):
        inputs = 16 * HOST.lanes
        tokens = products.MOST_NUMBERS // inputs
        for x in (self.X, (1, HOST.lanes), (tokens, inputs), (8, 1024), (8, 14336)):
            x = jnp.ones(x)
            assert products.takes(x, jnp.ones((24, x.shape[1])))

    def others(self):
        """What it leaves to XLA: other dtypes, parts of vectors, many tokens, nothing at all."""
        yield normal(*self.X).astype(jnp.bfloat16), normal(*self.WEIGHT).astype(jnp.bfloat16)
        yield normal(*self.X).astype(np.float16), normal(*self.WEIGHT).astype(np.float16)
        yield normal(4, HOST.lanes - 1), normal(24, HOST.lanes - 1)
        yield normal(4, HOST.lanes + 2), normal(24, HOST.lanes + 2)
        yield normal(products.MOST_NUMBERS // 64 + 1, 64), normal(*self.WEIGHT)
        yield normal(9, 1024), normal(24, 1024)
        yield normal(4, 0), normal(24, 0)
        yield normal(0, 64), normal(*self.WEIGHT)
        yield normal(*self.X), normal(0, 64)

    def test_xla_multiplies_what_it_refuses(self):
        for x, weight in self.others():
            assert not products.takes(x, weight), (x.shape, x.dtype)
            got = linear(jnp.asarray(x), jnp.asarray(weight), jnp.float32, backend="cpu")
            assert got.dtype == jnp.float32
            want = x.astype(np.float64) @ weight.astype(np.float64).T
            np.testing.assert_allclose(got, want, atol=1e-4)

    def test_what_cannot_be_multiplied_is_an_error(self):
        for x in ((4, 32), (4, 128), (64,), (2, 4, 64)):
            with pytest.raises((TypeError, ValueError)):
                linear(jnp.ones(x), jnp.ones(self.WEIGHT), backend="cpu")

    @pytest.mark.parametrize("dtype", [None, jnp.float32, jnp.bfloat16])
    def test_linear_takes_it_and_gives_the_dtype_that_is_asked(self, dtype):
        x, weight = normal(*self.X), normal(*self.WEIGHT, seed=1)
        multiply = functools.partial(linear, dtype=dtype, backend="cpu")
        assert products.TARGET in jax.jit(multiply).lower(x, weight).as_text()
        got = multiply(x, weight)
        assert got.dtype == (dtype or jnp.float32)
        want = jnp.asarray(kernel(HOST)(x, weight)).astype(dtype or jnp.float32)
        np.testing.assert_array_equal(got, want)


class TestTransformations:
    """What XLA's product can be, this one can: mapped, and differentiated either way."""

    X, WEIGHT = normal(4, 64), normal(24, 64, seed=1)

    def linear(self, backend):
        return functools.partial(linear, backend=backend)

    def test_derivatives_are_those_of_a_product(self):
        cases = normal(4, 24, seed=2), normal(4, 64, seed=3), normal(24, 64, seed=4)
        of_result, dx, dweight = (case.astype(np.float64) for case in cases)
        y, pull = jax.vjp(self.linear("cpu"), self.X, self.WEIGHT)
        np.testing.assert_array_equal(y, kernel(HOST)(self.X, self.WEIGHT))
        of_x, of_weight = pull(jnp.asarray(cases[0]))
        np.testing.assert_allclose(of_x, of_result @ self.WEIGHT, atol=1e-4)
        np.testing.assert_allclose(of_weight, of_result.T @ self.X, atol=1e-4)
        _, tangent = jax.jvp(self.linear("cpu"), (self.X, self.WEIGHT), cases[1:])
        np.testing.assert_allclose(tangent, dx @ self.WEIGHT.T + self.X @ dweight.T, atol=1e-4)

    @pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
    def test_each_of_many_is_what_it_is_alone(self, axes):
        x, weight = (
            normal(3, *one.shape, seed=5) if axis == 0 else one
            for one, axis in zip((self.X, self.WEIGHT), axes, strict=True)
        )
        got = jax.vmap(self.linear("cpu"), axes)(x, weight)
        for i in range(3):
            pair = (
                one[i] if axis == 0 else one for one, axis in zip((x, weight), axes, strict=True)
            )
            np.testing.assert_array_equal(got[i], kernel(HOST)(*pair))


class TestThreads:
    SHAPES = ((1, 16, 1), (1, 64, 40), (1, 784, 3001), (7, 576, 1536), (16, 1536, 577), (3, 48, 9))

    def test_many_callers_at_once(self):
        product = jax.jit(products.product)
        cases = [(normal(t, i), normal(f, i, seed=1)) for t, i, f in self.SHAPES]
        wants = [np.asarray(product(*case)) for case in cases]

        def call(number):
            case = number % len(cases)
            got = np.asarray(product(*cases[case]))
            return got.tobytes() == wants[case].tobytes()

        with concurrent.futures.ThreadPoolExecutor(12) as threads:
            assert all(threads.map(call, range(1500)))

    def test_products_of_one_program_that_run_beside_each_other(self):
        x, weights = normal(5, 1024), [normal(700, 1024, seed=s) for s in range(12)]
        together = jax.jit(lambda x, weights: [products.product(x, w) for w in weights])
        for _ in range(20):
            for got, weight in zip(together(x, weights), weights, strict=True):
                np.testing.assert_array_equal(got, kernel(HOST)(x, weight))


# Says of some products which bits they have, and how many programs the cache had.
PROGRAM = """
import hashlib, json, sys
import jax, numpy as np
from jpaged.pallas_kernels.cpu import products

hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name.endswith("/cache_hits")))
bits = hashlib.sha256()
for tokens, inputs, features in json.loads(sys.argv[1]):
    x = np.random.default_rng((0, tokens, inputs)).standard_normal((tokens, inputs), np.float32)
    rng = np.random.default_rng((1, features, inputs))
    weight = rng.standard_normal((features, inputs), np.float32)
    bits.update(np.asarray(jax.jit(products.product)(x, weight)).tobytes())
print(json.dumps({"bits": bits.hexdigest(), "hits": sum(hits)}))
"""


def in_a_process(shapes, **variables):
    command = [sys.executable, "-c", PROGRAM, json.dumps(shapes)]
    done = subprocess.run(
        command, env=os.environ | variables, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


@pytest.mark.slow
class TestProcesses:
    def bits(self):
        bits = hashlib.sha256()
        for tokens, inputs, features in TestThreads.SHAPES:
            case = normal(tokens, inputs), normal(features, inputs, seed=1)
            bits.update(kernel(HOST)(*case).tobytes())
        return bits.hexdigest()

    @pytest.mark.parametrize("threads", ["1", "2", "8"])
    def test_any_number_of_threads_gives_the_same_bits(self, threads, tmp_path):
        got = in_a_process(
            TestThreads.SHAPES, PJRT_NPROC=threads, JAX_COMPILATION_CACHE_DIR=str(tmp_path)
        )
        assert got["bits"] == self.bits()

    def test_a_program_that_an_earlier_process_compiled(self, tmp_path):
        cache = dict(
            JAX_COMPILATION_CACHE_DIR=str(tmp_path),
            JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
            JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES="-1",
        )
        first, second = (in_a_process(TestThreads.SHAPES, **cache) for _ in range(2))
        assert first["hits"] == 0
        assert second["hits"] == len(TestThreads.SHAPES)
        assert first["bits"] == second["bits"] == self.bits()
