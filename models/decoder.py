# SPDX-License-Identifier: Apache-2.0
"""One decoder for every family: `apply(params, inputs, kv_pages) -> (logits, kv_pages)`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from jpaged.models import layers, sharding
from jpaged.models.cache_groups import CacheGroups, cache_groups
from jpaged.models.config import ModelConfig
from jpaged.models.decoder_layer import DecoderLayer, LayerPattern
from jpaged.models.families.base import layer_of
from jpaged.models.inputs import PagedInputs
from jpaged.pallas_kernels import dispatch
from jpaged.pallas_kernels.rows import Rows

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A model as pure functions of a plain parameter pytree.

    Attributes:
      config: the model's shape.
      scan_layers: False unrolls the layers (fastest on CPUs and GPUs, where a scan copies weights);
        True scans over stacked weights, which compiles in a time that does not grow with depth
        (right for TPUs): over repetitions of the config's pattern, and what is left is unrolled.
        The parameter tree differs: see `stack_layers`.
      backend: which kernels to use, as in `pallas_kernels.paged_attention`.
      mesh: devices with one axis, over which `apply` splits the heads; the caller lays parameters
        and pool out as `models.sharding` says. None computes on one device.
      max_length: longest sequence that is served, in tokens, on which some rotary embeddings and
        `cache_groups` depend; None is no longer than the model was first made for.
    """

    config: ModelConfig
    scan_layers: bool = False
    backend: str | None = None
    mesh: jax.sharding.Mesh | None = None
    max_length: int | None = None

    def __post_init__(self):
        if self.mesh is not None:
            sharding.check_mesh(self.config, self.mesh)

    def init(self, key: jax.Array, dtype: jnp.dtype = jnp.float32) -> Params:
        """Random parameters. Args: a PRNG key and the dtype of every parameter."""
        token_ids = jnp.zeros((1, 1), jnp.int32)
        module = self._dense_module(1, dtype)
        params: Params = dict(module.init(key, token_ids[0], token_ids[0], None)["params"])
        return stack_layers(params, self.config) if self.scan_layers else params

    def abstract_params(self, dtype: jnp.dtype = jnp.float32) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s, without computing anything."""
        leaves, tree = _abstract_leaves(dataclasses.replace(self, mesh=None), dtype)
        return jax.tree.unflatten(tree, leaves)

    @property
    def num_params(self) -> int:
        """Parameters, the tied head counted once."""
        return self.param_sum(lambda params: jax.tree.map(lambda leaf: leaf.size, params))

    def param_sum(self, measure: Callable[[Params], Any]) -> int:
        """The sum of a number of each parameter; one pattern is traced, however many there are.

        Args:
          measure: gives those of a tree as `abstract_params` has it, layers unstacked.
        """
        period = len(self.config.pattern)
        traced = Decoder(dataclasses.replace(self.config, num_layers=period)).abstract_params()
        sums = {name: sum(jax.tree.leaves(tree)) for name, tree in measure(traced).items()}
        in_layers = [sums.pop(f"layers_{i}") for i in range(period)]
        repetitions, rest = divmod(self.config.num_layers, period)
        return sum(sums.values()) + repetitions * sum(in_layers) + sum(in_layers[:rest])

    def apply(
        self, params: Params, inputs: PagedInputs, kv_pages: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Runs one step: writes the new tokens' keys and values, and attends over all.

        Args:
          params: as `init` makes them; pages of eight bits want one more, `kv_scales`,
            f32[num_layers, 2]: what the stored keys and values of each layer are multiplied by.
          inputs: the step's tokens, and page tables: one for each of `cache_groups(config,
            max_length)`, or one for all layers.
          kv_pages: [num_layers, num_pages, num_kv_heads, page_size, kv_dim], of as many layers as
            a group has where there are groups; may be donated.

        Returns:
          f32[num_samples, vocab_size], logits after each token of `inputs.logits_indices`, and
          kv_pages with the step's keys and values written.
        """
        module = _DecoderModule(
            self.config,
            functools.partial(
                _paged_attend,
                groups=cache_groups(self.config, self.max_length),
                kv_scales=params.get("kv_scales"),
                backend=self.backend,
                mesh=self.mesh,
            ),
            self.scan_layers,
            _dtype_of(params),
            self.max_length,
            least_lookup=1 if self.mesh is None else 2,
            multiply=self._multiply(),
        )
        logits, written_pages = module.apply(
            {"params": params},
            inputs.token_ids,
            inputs.positions,
            inputs.rows,
            kv_pages,
            inputs.logits_indices,
        )
        return logits, cast(jax.Array, written_pages)

    def _multiply(self) -> layers.Multiply:
        """By the backend's kernels, but over a mesh, where the compiler splits products itself."""
        if self.mesh is not None:
            return layers.linear
        return functools.partial(layers.linear, backend=dispatch.resolve_backend(self.backend))

    def apply_dense(self, params: Params, token_ids: jax.Array) -> jax.Array:
        """Runs whole sequences without a cache; differentiable, for training and for checks.

        Args:
          params: unstacked, as `init` makes them with scan_layers=False.
          token_ids: i32[batch, seq_len].

        Returns:
          f32[batch, seq_len, vocab_size].
        """
        batch, seq_len = token_ids.shape
        positions = jnp.tile(jnp.arange(seq_len, dtype=jnp.int32), batch)
        logits, _ = self._dense_module(batch, _dtype_of(params)).apply(
            {"params": params}, token_ids.reshape(-1), positions, None
        )
        return logits.reshape(batch, seq_len, -1)

    def _dense_module(self, batch: int, dtype: jnp.dtype) -> "_DecoderModule":
        attend = functools.partial(_dense_attend, batch=batch)
        return _DecoderModule(self.config, attend, False, dtype, self.max_length)


# To trace a layer takes most of what loading a small model takes, and loading asks more than once.
@functools.lru_cache(maxsize=8)
def _abstract_leaves(decoder: Decoder, dtype: jnp.dtype) -> tuple[list[Any], Any]:
    """The leaves of `Decoder.abstract_params`, and their tree."""
    config, period = decoder.config, len(decoder.config.pattern)
    one = Decoder(dataclasses.replace(config, num_layers=period))
    # With the key inside, which would be compiled outside.
    params = dict(jax.eval_shape(lambda: one.init(jax.random.key(0), dtype)))
    pattern = [params.pop(f"layers_{i}") for i in range(period)]
    params |= {f"layers_{i}": pattern[i % period] for i in range(config.num_layers)}

    def stack(*layers: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(layers), *layers[0].shape), layers[0].dtype)

    return jax.tree.flatten(stack_layers(params, config, stack) if decoder.scan_layers else params)


def num_repetitions(config: ModelConfig) -> int:
    """How often the pattern repeats where layers are scanned over; 0 where it does not."""
    repetitions = config.num_layers // len(config.pattern)
    return repetitions if repetitions > 1 else 0


def stack_layers(
    params: Params,
    config: ModelConfig,
    stack: Callable[..., Any] = lambda *leaves: jnp.stack(leaves),
) -> Params:
    """Turns `layers_0 .. layers_n` into one tree `layers`, for a scan.

    Args:
      params: as `Decoder.init` makes them with scan_layers=False.
      config: the model's.
      stack: what makes one of those of all repetitions.

    Returns:
      The parameters, in `layers` those of each layer of the pattern by its number, with an axis of
      repetitions first; layers beyond the last whole repetition stay what they are.
    """
    period, repetitions = len(config.pattern), num_repetitions(config)
    if not repetitions:
        return params
    stacked = {
        str(index): jax.tree.map(
            stack,
            *(params[f"layers_{index + period * k}"] for k in range(repetitions)),
        )
        for index in range(period)
    }
    scanned = {f"layers_{i}" for i in range(period * repetitions)}
    rest = {name: tree for name, tree in params.items() if name not in scanned}
    return rest | {"layers": stacked}


def stacked_place(path: str, config: ModelConfig) -> tuple[str, int, int] | None:
    """Where `stack_layers` puts a parameter, e.g. of path `layers_3/mlp/up_proj/weight`.

    Returns:
      The path of the stacked parameter, such as `layers/0/mlp/up_proj/weight`, which repetition it
      is there, and of how many; None of what is not stacked.
    """
    period, repetitions = len(config.pattern), num_repetitions(config)
    layer = layer_of(path)
    if layer is None or layer[0] >= period * repetitions:
        return None
    return f"layers/{layer[0] % period}/{layer[1]}", layer[0] // period, repetitions


class _DecoderModule(nn.Module):
    """Embedding, layers, final norm and head over a flat axis of tokens.

    Of one token the compiler makes the lookup a slice, for which each of several devices would be
    sent the whole embedding: `least_lookup` tokens are looked up at least.
    """

    config: ModelConfig
    attend: layers.Attend
    scan_layers: bool
    dtype: jnp.dtype
    max_length: int | None
    least_lookup: int = 1
    multiply: layers.Multiply = layers.linear

    @nn.compact
    def __call__(self, token_ids, positions, rows: Rows | None, kv_pages=None, logits_indices=None):
        c = self.config
        embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.dtype
        )
        tables = tuple(rope.table(positions, self.max_length) for rope in c.ropes)
        if (missing := self.least_lookup - token_ids.shape[0]) > 0:
            x = embedding[jnp.pad(token_ids, (0, missing))]
            x = jax.lax.optimization_barrier(x)[: token_ids.shape[0]]
        else:
            x = embedding[token_ids]
        if c.embedding_scale is not None:
            x = x * jnp.asarray(c.embedding_scale, x.dtype)
        carry, scanned = (x, kv_pages), 0
        if self.scan_layers and (repetitions := num_repetitions(c)):
            scanned = repetitions * len(c.pattern)
            stack = nn.scan(
                LayerPattern,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                # flax annotates in_axes as an int, and takes one entry an argument.
                in_axes=(0, nn.broadcast, nn.broadcast),  # pyright: ignore[reportArgumentType]
                length=repetitions,
                # It takes kernels with effects, which Pallas for TPUs has under jax 0.11, for
                # results that are constant over the layers, and refuses them.
                check_constancy_invariants=False,
            )(c, self.attend, self.multiply, name="layers")
            carry, _ = stack(carry, jnp.arange(repetitions, dtype=jnp.int32), tables, rows)
        for i in range(scanned, c.num_layers):
            layer = DecoderLayer(c.layer(i), c, self.attend, self.multiply, name=f"layers_{i}")
            carry, _ = layer(carry, i, tables, rows)
        x, kv_pages = carry
        if logits_indices is not None:
            x = x[logits_indices]
        x = layers.RMSNorm(c.norm, name="final_norm")(x)
        head = embedding
        if not c.tie_word_embeddings:
            head = self.param(
                "lm_head", nn.initializers.normal(0.02), (c.vocab_size, c.hidden_size), self.dtype
            )
        logits = self.multiply(x, head, jnp.float32)
        if c.logit_soft_cap is not None:
            logits = c.logit_soft_cap * jnp.tanh(logits / c.logit_soft_cap)
        return logits, kv_pages


def _paged_attend(
    q, k, v, kv_pages, layer, rows, variant, sinks, *, groups: CacheGroups, kv_scales, backend, mesh
):
    """An `Attend` over pages."""
    kv_scale = None if kv_scales is None else kv_scales[layer]
    if rows.has_groups:
        if isinstance(layer, int):
            group, layer = groups.places[layer]
        else:
            group, layer = jnp.asarray(groups.places, jnp.int32)[layer]
        rows = rows.of_group(group)

    def attend(q, k, v, kv_pages, layer, rows, sinks, kv_scale):
        where = {"layer": layer, "kv_scale": kv_scale, "backend": backend}
        # Written first: a query sees its own step's keys as later steps will, rounded.
        kv_pages = dispatch.write(kv_pages, k, v, rows, **where)
        return dispatch.attend(q, kv_pages, rows, variant, sinks=sinks, **where), kv_pages

    if mesh is None:
        return attend(q, k, v, kv_pages, layer, rows, sinks, kv_scale)
    # Kernels are no operations that the compiler could split by itself. A head needs no other.
    heads, pool = sharding.heads_spec(mesh), sharding.pool_spec(mesh)
    one = jax.sharding.PartitionSpec()
    split = jax.shard_map(
        attend,
        mesh=mesh,
        in_specs=(heads, heads, heads, pool, one, one, sharding.sinks_spec(mesh), one),
        out_specs=(heads, pool),
        check_vma=False,  # Pallas says nothing of what differs between devices
    )
    return split(q, k, v, kv_pages, jnp.asarray(layer, jnp.int32), rows, sinks, kv_scale)


def _dense_attend(q, k, v, kv_pages, layer, rows, variant, sinks, *, batch):
    """An `Attend` over whole sequences, `batch` of them of the same length."""
    del layer, rows  # nothing is cached
    num_kv_heads, head_dim = k.shape[1:]
    # [batch, seq_len, num_kv_heads, group, head_dim], in float32 like the kernels.
    q32 = q.astype(jnp.float32).reshape(
        batch, -1, num_kv_heads, q.shape[1] // num_kv_heads, head_dim
    )
    k32 = k.astype(jnp.float32).reshape(batch, -1, num_kv_heads, head_dim)
    v32 = v.astype(jnp.float32).reshape(batch, -1, num_kv_heads, head_dim)
    scores = jnp.einsum("btkgd,bskd->bkgts", q32, k32) * variant.scale(head_dim)
    positions = jnp.arange(scores.shape[-1])
    visible = variant.sees(queries=positions[:, None], keys=positions[None, :])
    scores = jnp.where(visible[None, None, None], variant.capped(scores), -jnp.inf)
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, num_kv_heads, -1, 1, 1)
        scores = jnp.concatenate([scores, jnp.broadcast_to(sinks, (*scores.shape[:4], 1))], axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)[..., : k32.shape[1]]
    out = jnp.einsum("bkgts,bskd->btkgd", weights, v32)
    return out.reshape(q.shape).astype(q.dtype), kv_pages


def _dtype_of(params: Params) -> jnp.dtype:
    return params["embedding"].dtype
