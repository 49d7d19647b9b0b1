# SPDX-License-Identifier: Apache-2.0
"""Scales of float8 keys and values that a checkpoint has beside its weights."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jpaged.models.json_fields import shown
from jpaged.models.stored_tensor import CheckpointError, StoredTensor

# As llm-compressor, ModelOpt and AutoFP8 name them, and vLLM reads them.
_NAME = re.compile(
    r"model\.layers\.(\d{1,9})\.self_attn\."
    r"(?:(kv?|v)_scale|(k|v)_proj\.(?:output_scale|k_scale|v_scale))"
)
_PARTS = {"k": (0,), "v": (1,), "kv": (0, 1)}
_DTYPES = ("F32", "F16", "BF16")


def is_kv_scale(name: str) -> bool:
    """Whether a tensor of this name is a scale, and no weight."""
    return _NAME.fullmatch(name) is not None


def quantizes_kv_alone(quantization: Any) -> bool:
    """Whether a config.json's `quantization_config` leaves weights as they are.

    Args:
      quantization: its value. The one that does is compressed-tensors', without a group of weights
        and with a scheme of float8 keys and values, one scale a tensor.
    """
    if not isinstance(quantization, Mapping) or quantization.get("config_groups"):
        return False
    scheme = quantization.get("kv_cache_scheme")
    wanted = {"num_bits": 8, "type": "float", "strategy": "tensor"}
    return (
        quantization.get("quant_method") == "compressed-tensors"
        and isinstance(scheme, Mapping)
        and all(scheme.get(name) == value for name, value in wanted.items())
        and not scheme.get("dynamic")
    )


def read_stored_scales(
    source: str,
    num_layers: int,
    stored: Mapping[str, StoredTensor],
    read: Callable[[str], np.ndarray],
) -> np.ndarray | None:
    """Reads the scales of a checkpoint.

    Args:
      source: what messages call it.
      num_layers: of the model.
      stored: its tensors with names as `is_kv_scale` knows them.
      read: a tensor by its name.

    Returns:
      f32[num_layers, 2], what stored keys and stored values of each layer are multiplied by; None
      where there are none.

    Raises:
      CheckpointError: if a layer lacks one or has two, or one is no finite number above 0.
    """
    if not stored:
        return None
    scales = np.full((num_layers, 2), np.nan, np.float32)
    names: dict[tuple[int, int], str] = {}
    for name, tensor in sorted(stored.items()):
        match = _NAME.fullmatch(name)
        assert match is not None
        layer, parts = int(match[1]), _PARTS[match[2] or match[3]]
        if layer >= num_layers:
            raise _error(source, f"{shown(name)} is of a layer that the model does not have")
        if tensor.shape not in ((), (1,)) or tensor.dtype not in _DTYPES:
            what = f"has shape {list(tensor.shape)} and dtype {tensor.dtype}"
            raise _error(source, f"{shown(name)} {what}; a layer has one number of each")
        number = float(read(name).reshape(()))
        if not (0 < number < np.inf):
            raise _error(source, f"{shown(name)} is {number}, and must be finite and above 0")
        for part in parts:
            if (layer, part) in names:
                both = f"{shown(names[layer, part])} and {shown(name)}"
                raise _error(source, f"{both} are both there")
            names[layer, part] = name
            scales[layer, part] = number
    if np.isnan(scales).any():
        layer, part = np.argwhere(np.isnan(scales))[0]
        raise _error(source, f"layer {layer} has none of its {('keys', 'values')[part]}")
    return scales


def _error(source: str, what: str) -> CheckpointError:
    return CheckpointError(
        f"{source}: of the scales of float8 keys and values, {what}; give others (--kv_scales)"
    )
