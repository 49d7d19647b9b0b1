# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts beside one in float64 that takes tokens and experts one by one."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jpaged.models.config import ExpertsSpec
from jpaged.models.experts import Experts, route

WEIGHTS = ("softmax", "renormalized", "softmax_of_chosen")
HIDDEN, INNER = 10, 7


def chosen_by_hand(logits, count):
    """The experts of a token: the largest, the first of equals, largest first."""
    return sorted(range(len(logits)), key=lambda e: (-logits[e], e))[:count]


def weights_by_hand(logits, chosen, kind):
    powers = np.exp(logits - logits.max())
    of_all = powers[chosen] / powers.sum()
    # Over the chosen alone, the sum of all cancels.
    return of_all if kind == "softmax" else of_all / of_all.sum()


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def mixture(spec, params, x):
    """[num_tokens, hidden_size] in float64: the chosen experts' outputs, weighed and summed."""
    params = {
        name: {k: np.asarray(v, np.float64) for k, v in p.items()} for name, p in params.items()
    }
    out = np.zeros(x.shape)

    def project(name, expert, row):
        weight, bias = params[name]["weight"][expert], params[name].get("bias")
        return weight @ row + (0 if bias is None else bias[expert])

    for i, row in enumerate(np.asarray(x, np.float64)):
        logits = params["router"]["weight"] @ row + params["router"].get("bias", 0)
        chosen = chosen_by_hand(logits, spec.num_experts_per_token)
        for expert, weight in zip(
            chosen, weights_by_hand(logits, chosen, spec.weights), strict=True
        ):
            gate, up = (project(name, expert, row) for name in ("gate_proj", "up_proj"))
            if spec.activation == "swiglu_oai":
                gate, up = np.minimum(gate, spec.limit), np.clip(up, -spec.limit, spec.limit)
                inner = gate * sigmoid(1.702 * gate) * (up + 1)
            else:
                inner = gate * sigmoid(gate) * up
            out[i] += weight * project("down_proj", expert, inner)
    return out


def numbers(spec, seed):
    """Parameters; the router's are few whole numbers, so that logits are exact, and many equal."""
    rng = np.random.default_rng(seed)
    num_experts = spec.num_experts
    shapes = {
        "gate_proj": (INNER, HIDDEN),
        "up_proj": (INNER, HIDDEN),
        "down_proj": (HIDDEN, INNER),
    }
    params = {name: {"weight": rng.normal(size=(num_experts, *s))} for name, s in shapes.items()}
    params["router"] = {"weight": rng.integers(-1, 2, (num_experts, HIDDEN))}
    if spec.bias:
        params["router"]["bias"] = rng.integers(-1, 2, num_experts)
        for name, shape in shapes.items():
            params[name]["bias"] = rng.normal(size=(num_experts, shape[0]))
    params = {n: {k: jnp.asarray(v, jnp.float32) for k, v in p.items()} for n, p in params.items()}
    return params, rng.integers(-1, 2, (33, HIDDEN)).astype(np.float32)


SPECS = [
    *(
        ExpertsSpec(num_experts=6, num_experts_per_token=3, intermediate_size=INNER, weights=kind)
        for kind in WEIGHTS
    ),
    ExpertsSpec(
        num_experts=5, num_experts_per_token=2, intermediate_size=INNER, bias=True, limit=1.5,
        weights="softmax_of_chosen", activation="swiglu_oai",
    ),
    # Every expert, one alone of many, and the only one.
    ExpertsSpec(num_experts=3, num_experts_per_token=3, intermediate_size=INNER),
    ExpertsSpec(num_experts=40, num_experts_per_token=1, intermediate_size=INNER),
    ExpertsSpec(num_experts=1, num_experts_per_token=1, intermediate_size=INNER),
]  # fmt: skip


@pytest.mark.parametrize(
    "spec", SPECS, ids=lambda s: f"{s.num_experts_per_token}of{s.num_experts}-{s.weights}"
)
def test_a_mixture_token_by_token(spec):
    params, x = numbers(spec, seed=spec.num_experts)
    out = jax.jit(Experts(spec).apply)({"params": params}, jnp.asarray(x))
    want = mixture(spec, params, x)
    np.testing.assert_allclose(out, want, atol=2e-5 * np.abs(want).max(), rtol=0)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_route_by_hand(kind):
    """Experts 1 and 3 are equal, and so are all of the second token: the first ones are taken."""
    spec = dataclasses.replace(SPECS[0], num_experts=4, num_experts_per_token=2, weights=kind)
    log = np.log(np.array([[2, 3, 1, 3], [5, 5, 5, 5], [1, 2, 4, 8]], np.float32))
    experts, weights = route(spec, jnp.asarray(log))
    assert np.asarray(experts).tolist() == [[1, 3], [0, 1], [3, 2]]
    assert (experts.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    want = {
        "softmax": [[3 / 9, 3 / 9], [1 / 4, 1 / 4], [8 / 15, 4 / 15]],
    }.get(kind, [[1 / 2, 1 / 2], [1 / 2, 1 / 2], [2 / 3, 1 / 3]])
    np.testing.assert_allclose(weights, want, atol=1e-6)


def test_many_routes_with_ties():
    """In bfloat16 too, whose few numbers are often equal."""
    rng = np.random.default_rng(0)
    # Of zeros, the one above the other would be taken first.
    logits = jnp.asarray(rng.normal(size=(200, 16)), jnp.bfloat16).round(1) + 0
    for kind in WEIGHTS:
        spec = dataclasses.replace(SPECS[0], num_experts=16, num_experts_per_token=4, weights=kind)
        experts, weights = map(np.asarray, route(spec, logits))
        num_ties = 0
        for row, found, factors in zip(
            np.asarray(logits, np.float64), experts, weights, strict=True
        ):
            chosen = chosen_by_hand(row, 4)
            num_ties += len(set(row[chosen])) < 4
            assert found.tolist() == chosen
            np.testing.assert_allclose(factors, weights_by_hand(row, chosen, kind), atol=1e-6)
        assert num_ties > 20
