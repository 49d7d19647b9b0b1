# SPDX-License-Identifier: Apache-2.0
"""Tensors of checkpoints of any form, unread, and the error of those that are not a model's."""

import dataclasses
import pathlib
from collections.abc import Callable

import numpy as np

WEIGHT_DTYPES = ("float32", "float16", "bfloat16")
"""What weights may be, by NumPy's names."""


MemoryOf = Callable[[str], np.ndarray | None]
"""Of a parameter's path, memory of the host that it is read to; None leaves it to the reader."""


class CheckpointError(ValueError):
    """A checkpoint that does not hold this model; the message names file, tensor and remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a checkpoint, unread.

    Attributes:
      file: where it lies.
      name: in the file, where the model's family may know it by another.
      shape, dtype: as its header says; the dtype in the words of the format.
    """

    file: pathlib.Path
    name: str
    shape: tuple[int, ...]
    dtype: str


def no_memory(path: str) -> np.ndarray | None:
    """Leaves all parameters to the reader."""
    return None
