# SPDX-License-Identifier: Apache-2.0
"""The models of GGUF files: their metadata as a config.json, and where their weights are.

Only here is known what llama.cpp calls things, but for a family's name and form, which are in the
family's own file. What the fields of a config.json mean is the families' knowledge, as for any
other model. As there, what changes the result is honoured or refused by name.
"""

import collections
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import jax
import numpy as np

from jpaged.models.config import ModelConfig
from jpaged.models.config_json import config_from_hf
from jpaged.models.families import FAMILIES
from jpaged.models.families.base import Source, layer_of
from jpaged.models.fitting import check_size, check_tensors, wanted_shapes
from jpaged.models.generation_config import GenerationConfig, faults_of
from jpaged.models.gguf_file import GgufFile, Reading
from jpaged.models.host_arrays import MOST_THREADS
from jpaged.models.json_fields import ModelConfigError, listed, shown, typed
from jpaged.models.safetensors_files import DTYPES
from jpaged.models.stored_tensor import MemoryOf, no_memory

# By what general.architecture says.
_FAMILIES = MappingProxyType(
    {family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None}
)
# Keys below the architecture's name that are fields of a config.json.
_FIELDS = MappingProxyType(
    {
        "attention.head_count": ("num_attention_heads", int),
        "attention.layer_norm_rms_epsilon": ("rms_norm_eps", float),
        "block_count": ("num_hidden_layers", int),
        "context_length": ("max_position_embeddings", int),
        "embedding_length": ("hidden_size", int),
        "feed_forward_length": ("intermediate_size", int),
    }
)
# Those that are read by hand, and those that change nothing.
_OTHERS = frozenset(
    {
        "attention.head_count_kv",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
        "rope.freq_base",
        "rope.scale_linear",
        "rope.scaling.factor",
        "rope.scaling.original_context_length",
        "rope.scaling.type",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        # Sizes that the tensors say, and how the file was made.
        "rope.scaling.finetuned",
        "tensor_data_layout",
        "vocab_size",
    }
)
# Those that change nothing at this value, and would at any other.
_NEUTRAL = MappingProxyType(
    {
        "attention.causal": True,
        "rope.scaling.attn_factor": 1.0,
        "rope.scaling.yarn_attn_factor": 1.0,
    }
)
# Parameters that are begun while one is waited for, or threads would have nothing to do at the end
# of each: many have one part.
_MOST_WAITING = 2 * MOST_THREADS
_ROPE_FACTORS = "rope_freqs.weight"
_BIAS_OF = MappingProxyType({"attention_bias": "attn_q.bias", "mlp_bias": "ffn_gate.bias"})
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"
_MODEL_WEIGHTS = MappingProxyType(
    {"embedding": _EMBEDDING, "final_norm/scale": "output_norm.weight", "lm_head": _HEAD}
)
_LAYER_WEIGHTS = MappingProxyType(
    {
        "attention_norm/scale": "attn_norm.weight",
        "attention/q_norm/scale": "attn_q_norm.weight",
        "attention/k_norm/scale": "attn_k_norm.weight",
        "mlp_norm/scale": "ffn_norm.weight",
        **{
            f"{ours}/{part}": f"{theirs}.{part}"
            for part in ("weight", "bias")
            for ours, theirs in (
                ("attention/q_proj", "attn_q"),
                ("attention/k_proj", "attn_k"),
                ("attention/v_proj", "attn_v"),
                ("attention/o_proj", "attn_output"),
                ("mlp/gate_proj", "ffn_gate"),
                ("mlp/up_proj", "ffn_up"),
                ("mlp/down_proj", "ffn_down"),
            )
        },
    }
)
_SAMPLING = MappingProxyType(
    {
        "temp": ("temperature", float),
        "top_k": ("top_k", int),
        "top_p": ("top_p", float),
        "min_p": ("min_p", float),
        "penalty_repeat": ("repetition_penalty", float),
    }
)
# Keys that change nothing while the other is 0, or not there.
_SWITCHES = MappingProxyType(
    {"mirostat_eta": "mirostat", "mirostat_tau": "mirostat", "xtc_threshold": "xtc_probability"}
)


def config_of(file: GgufFile) -> ModelConfig:
    """Reads the shape of a file's model.

    Raises:
      ModelConfigError: naming file and key, if it is of another architecture, or says something
        that is not supported.
    """
    try:
        return config_from_hf(_fields(file))
    except ModelConfigError as e:
        raise ModelConfigError(f"{file.path}: {e}") from e


class GgufWeights:
    """The parameters of a GGUF file, unread.

    Attributes:
      shapes: of the parameters that are there, by path.
      dtypes: in which they are stored; what is quantised is dequantised to float32.
    """

    def __init__(self, file: GgufFile, config: ModelConfig):
        """Holds the tensors of a file against its model.

        Raises:
          CheckpointError: if they are not this model's.
        """
        stored = {name: t for name, t in file.tensors.items() if name != _ROPE_FACTORS}
        name, asking = str(file.path), "its metadata"
        check_size(name, config, stored, asking)
        self.shapes = wanted_shapes(config, stored, _source_of)
        self._sources = {path: _source_of(path, s, config) for path, s in self.shapes.items()}
        wanted = {source.names[0]: source.shape for source in self._sources.values()}
        check_tensors(name, wanted, stored, asking)
        self._file = file
        self.dtypes = {
            path: DTYPES.get(stored[source.names[0]].dtype, np.dtype(np.float32))
            for path, source in self._sources.items()
        }

    def read(
        self, targets: Mapping[str, jax.ShapeDtypeStruct], memory_of: MemoryOf = no_memory
    ) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
        """Reads parameters, each dequantised whole, those that have a place some at a time.

        Args:
          targets: dtype and sharding of each that is wanted, by path.
          memory_of: memory of the host that some are read to.

        Yields:
          Paths and arrays, in the order of the targets.

        Raises:
          CheckpointError: if the file is damaged, or a number is not finite.
        """
        begun: collections.deque[tuple[str, jax.ShapeDtypeStruct, np.ndarray | None, Reading]]
        begun = collections.deque()
        try:
            for path, target in targets.items():
                source, memory = self._sources[path], memory_of(path)
                straight = memory if source.view is None else None
                reading = self._file.begin(source.names[0], target.dtype, straight)
                begun.append((path, target, memory, reading))
                # What is not read to its place may be beside the model in memory.
                while len(begun) > (_MOST_WAITING if straight is not None else 0):
                    yield self._finish(*begun.popleft())
            while begun:
                yield self._finish(*begun.popleft())
        finally:
            for *_, reading in begun:
                reading.cancel()

    def _finish(
        self, path: str, target: jax.ShapeDtypeStruct, memory: np.ndarray | None, reading: Reading
    ) -> tuple[str, jax.Array | np.ndarray]:
        """Waits for a parameter, and returns it as `read` does."""
        whole, view = reading.finish(), self._sources[path].view
        if view is not None:
            whole = view(whole)
        if memory is not None:
            if view is not None:
                memory[...] = whole
            return path, memory
        assert target.sharding is not None
        array = jax.make_array_from_callback(target.shape, target.sharding, whole.__getitem__)
        return path, array.block_until_ready()


def _source_of(path: str, shape: tuple[int, ...], config: ModelConfig) -> Source:
    """Where a GGUF file has a parameter; see `families.source_of`."""
    layer = layer_of(path)
    if layer is None:
        return Source((_MODEL_WEIGHTS[path],), shape)
    index, own = layer
    view = None
    form = FAMILIES[config.family].gguf
    assert form is not None
    if form.pairs_are_neighbours and own.startswith(("attention/q_", "attention/k_")):
        attention = config.layer(index).attention
        is_query = own.startswith("attention/q_")
        view = _halves_of_pairs(attention.num_q_heads if is_query else attention.num_kv_heads)
    return Source((f"blk.{index}.{_LAYER_WEIGHTS[own]}",), shape, view=view)


def generation_config_of(file: GgufFile) -> GenerationConfig:
    """Reads a model's sampling settings.

    Raises:
      ModelConfigError: naming file and key, if one is out of range, or not supported.
    """
    found = {
        key.removeprefix("general.sampling."): value
        for key, value in file.metadata.items()
        if key.startswith("general.sampling.")
    }
    with faults_of(file.path):
        _check_penalty(found)
        if unknown := {
            key: value
            for key, value in found.items()
            if value and key not in _SAMPLING and found.get(_SWITCHES.get(key, key))
        }:
            raise ModelConfigError(f"general.sampling: {listed(unknown)}: not supported")
        values = {
            name: _short(typed(f"general.sampling.{key}", found[key], kind))
            for key, (name, kind) in _SAMPLING.items()
            if key in found
        }
        return GenerationConfig(**values)


def _check_penalty(found: dict[str, Any]) -> None:
    """Leaves of the repetition penalty what counts: it looks at all tokens, or not at any."""
    last = found.pop("penalty_last_n", -1)
    if found.get("penalty_repeat", 1.0) == 1.0:
        return
    if last == 0:
        del found["penalty_repeat"]
    elif last != -1:
        raise ModelConfigError(
            f"general.sampling.penalty_last_n={shown(last)} must be -1, for all tokens, or 0, for "
            f"none, beside penalty_repeat={shown(found['penalty_repeat'])}"
        )


def _fields(file: GgufFile) -> dict[str, Any]:
    """The metadata as the fields of a Hugging Face config.json."""
    kind = file.metadata.get("general.type", "model")
    name = str(file.metadata.get("general.architecture"))
    if kind != "model" or name not in _FAMILIES:
        raise ModelConfigError(
            f"general.architecture={shown(name)} of general.type={shown(kind)} is not supported in "
            f"GGUF files; supported: {', '.join(_FAMILIES)}, of type 'model'. Models of other "
            "families load from their Hugging Face directory"
        )
    prefix = f"{name}."
    own = {
        key.removeprefix(prefix): value
        for key, value in file.metadata.items()
        if key.startswith(prefix)
    }
    if unknown := {
        f"{prefix}{key}": value
        for key, value in own.items()
        if (value != _NEUTRAL[key] if key in _NEUTRAL else value)
        and key not in _FIELDS
        and key not in _OTHERS
    }:
        raise ModelConfigError(
            f"{listed(unknown)}: not supported in GGUF files. They could change what the model "
            "computes, so they are not ignored"
        )

    def read(key: str, of_kind: type, default: Any = None) -> Any:
        if key not in own and default is None:
            raise ModelConfigError(f"{prefix}{key} is missing; convert the model anew")
        return _short(typed(f"{prefix}{key}", own.get(key, default), of_kind))

    fields = {field: read(key, of_kind) for key, (field, of_kind) in _FIELDS.items()}
    heads = fields["num_attention_heads"]
    head_dim = read("attention.key_length", int, fields["hidden_size"] // max(heads, 1))
    for key in ("attention.value_length", "rope.dimension_count"):
        if read(key, int, head_dim) != head_dim:
            raise ModelConfigError(
                f"{prefix}{key}={own[key]} must be the heads' size, {head_dim} (that of "
                "attention.key_length, or of embedding_length by attention.head_count)"
            )
    family, embedding = _FAMILIES[name], file.tensors.get(_EMBEDDING)
    fields |= {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "num_key_value_heads": read("attention.head_count_kv", int, heads),
        "head_dim": head_dim,
        "vocab_size": embedding.shape[0] if embedding else read("vocab_size", int),
        "rope_parameters": _rope(file, read, fields["max_position_embeddings"]),
        "tie_word_embeddings": _HEAD not in file.tensors,
    }
    assert family.gguf is not None
    for field in family.gguf.bias_fields:
        if f"blk.0.{_BIAS_OF[field]}" in file.tensors:
            fields[field] = True
    keys = (f"tokenizer.ggml.{end}_token_id" for end in ("eos", "eot", "eom"))
    ends = [typed(key, file.metadata[key], int) for key in keys if key in file.metadata]
    return fields | {
        "bos_token_id": file.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(ends)),
    }


def _rope(file: GgufFile, read: Callable[..., Any], longest: int) -> Mapping[str, Any]:
    rope = {"rope_theta": read("rope.freq_base", float, 10_000.0)}
    # Old files have a number that divides positions, and no word for it.
    factor = read("rope.scaling.factor", float, read("rope.scale_linear", float, 1.0)) or 1.0
    kind = read("rope.scaling.type", str, "none" if factor == 1 else "linear")
    if kind not in ("none", "linear", "yarn"):
        raise ModelConfigError(
            f"rope.scaling.type={shown(kind)} is not supported in GGUF files; supported: 'none', "
            "'linear', 'yarn', and a tensor of factors, which Llama 3 has"
        )
    if _ROPE_FACTORS in file.tensors:
        if kind != "none":
            raise ModelConfigError(
                f"rope.scaling.type={shown(kind)} and the tensor {_ROPE_FACTORS!r} contradict each "
                "other"
            )
        factors = file.read(_ROPE_FACTORS, np.dtype(np.float32)).reshape(-1).tolist()
        # A factor each: whatever they were computed from, and for contexts of all lengths.
        return rope | {
            "rope_type": "longrope",
            "short_factor": factors,
            "long_factor": factors,
            "original_max_position_embeddings": longest,
            "attention_factor": 1.0,
        }
    if kind == "none" or factor == 1:
        return rope | {"rope_type": "default"}
    if kind == "linear":
        return rope | {"rope_type": "linear", "factor": factor}
    return rope | {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": read("rope.scaling.original_context_length", int),
        "beta_fast": read("rope.scaling.yarn_beta_fast", float, 32.0),
        "beta_slow": read("rope.scaling.yarn_beta_slow", float, 1.0),
    }


def _halves_of_pairs(num_heads: int) -> Callable[[Any], Any]:
    """Undoes the order in which llama.cpp keeps the rows of queries and keys.

    It turns lanes 2 i and 2 i + 1 of a head together, and we lanes i and i + head_dim / 2.
    """

    def view(weight: Any) -> Any:
        rows, *rest = weight.shape
        pairs = weight.reshape(num_heads, rows // num_heads // 2, 2, *rest)
        return pairs.swapaxes(1, 2).reshape(weight.shape)

    return view


def _short(value: Any) -> Any:
    """A float32 as the number with the fewest digits that is it, as makers wrote it."""
    return float(str(np.float32(value))) if isinstance(value, float) else value
