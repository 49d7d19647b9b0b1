# SPDX-License-Identifier: Apache-2.0
"""Whether the tensors of a checkpoint are those of a model: names, shapes, dtypes and number."""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Decoder
from jpaged.models.families import source_of
from jpaged.models.families.base import Source, layer_of
from jpaged.models.json_fields import shown
from jpaged.models.param_trees import flat
from jpaged.models.stored_tensor import CheckpointError, StoredTensor

TIED = ("embedding", "lm_head")
"""Parameters that may be one."""

_LAYER_NUMBER = re.compile(r"(?:model\.layers\.|layers_|blk\.)(\d{1,9})[./].*")


def check_dtypes(stored: Mapping[str, StoredTensor], supported: tuple[str, ...]) -> None:
    """Raises CheckpointError where a tensor is stored in a dtype that is not supported."""
    for name, tensor in stored.items():
        if tensor.dtype not in supported:
            raise CheckpointError(
                f"{tensor.file.name}: tensor {shown(name)} has dtype {tensor.dtype}; supported: "
                f"{', '.join(supported)}"
            )


def check_size(
    source: str, config: ModelConfig, stored: Mapping[str, Any], asking: str = "config.json"
) -> None:
    """Refuses by arithmetic what the files cannot hold, before anything grows with config.json."""
    num_params = sum(math.prod(tensor.shape) for tensor in stored.values())
    numbers = [int(match[1]) for name in stored if (match := _LAYER_NUMBER.fullmatch(name))]
    # Each of these is an axis of a tensor. Tracing a model takes what grows with them.
    widths = [
        width
        for layer in config.pattern
        for width in (
            layer.attention.num_q_heads * layer.attention.head_dim,
            layer.mlp.intermediate_size,
            getattr(layer.mlp, "num_experts", 1),
        )
    ]
    sizes, asked = (config.vocab_size, config.hidden_size, *widths), None
    if max(sizes) <= 4 * num_params:
        asked = Decoder(config).num_params
    # What is wrong by less is told tensor by tensor.
    if config.num_layers > len(stored) or asked is None or asked > 4 * num_params:
        raise CheckpointError(
            f"{asking} asks for {asked or 'far more'} parameters "
            f"(num_hidden_layers={config.num_layers}, hidden_size={config.hidden_size}, "
            f"intermediate_size={config.pattern[0].mlp.intermediate_size}, "
            f"vocab_size={config.vocab_size}, "
            f"num_attention_heads={config.num_q_heads}, num_key_value_heads="
            f"{config.num_kv_heads}, head_dim={config.head_dim}); {source} holds {num_params} in "
            f"{len(stored)} tensors of {len(set(numbers))} layers: one of them is not this model's"
        )


def wanted_shapes(
    config: ModelConfig,
    stored: Mapping[str, Any],
    find: Callable[[str, tuple[int, ...], ModelConfig], Source] = source_of,
) -> dict[str, tuple[int, ...]]:
    """Every parameter to be read, by path, and its shape.

    Args:
      config: the model's; `check_size` has bounded its sizes.
      stored: what there is, by the names of either form.
      find: where the files have a parameter.
    """
    period = len(config.pattern)
    one = dataclasses.replace(config, num_layers=period, tie_word_embeddings=False)
    shapes: dict[str, tuple[int, ...]] = {}
    layers: list[dict[str, tuple[int, ...]]] = [{} for _ in range(period)]
    for path, leaf in flat(Decoder(one).abstract_params()):
        layer = layer_of(path)
        if layer is None:
            shapes[path] = leaf.shape
        else:
            layers[layer[0]][layer[1]] = leaf.shape
    for number in range(config.num_layers):
        own = layers[number % period]
        shapes |= {f"layers_{number}/{path}": shape for path, shape in own.items()}
    if config.tie_word_embeddings:
        has = {
            path: path in stored or find(path, shapes[path], config).names[0] in stored
            for path in TIED
        }
        if not has["lm_head"]:
            del shapes["lm_head"]
        elif not has["embedding"]:
            del shapes["embedding"]
    return shapes


def check_tensors(
    source: str,
    wanted: Mapping[str, tuple[int, ...]],
    found: Mapping[str, Any],
    asking: str = "config.json",
) -> None:
    """Raises one error that lists every missing, unexpected or wrongly shaped tensor."""
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    wrong = [
        f"{name!r} has shape {found[name].shape}, {asking} asks for {wanted[name]}"
        for name in sorted(wanted.keys() & found.keys())
        if wanted[name] != found[name].shape
    ]
    problems = [
        f"missing {shown(name)}, nearest names there: {_nearest(name, extra or list(found))}"
        for name in missing[:8]
    ]
    problems += [
        f"unexpected {shown(name)}, nearest names expected: "
        f"{_nearest(name, missing or list(wanted))}"
        for name in extra[:8]
    ]
    problems = (problems + wrong)[:8]
    if problems:
        more = len(missing) + len(extra) + len(wrong) - len(problems)
        problems += [f"and {more} more"] if more else []
        raise CheckpointError(f"{source} does not hold this model: " + "; ".join(problems))


def _nearest(name: str, names: list[str]) -> list[str]:
    """Names that may have been meant, looked for among so many only that it takes no time."""
    short = [other for other in names if len(other) <= 200]
    return difflib.get_close_matches(name[:200], short[:2000], n=3)
