# SPDX-License-Identifier: Apache-2.0
"""GGUF files: what their header says, and their tensors, dequantised.

A header is read here, within bounds, and not by the package `gguf`: its reader makes an array of
every text, which takes fifty times as long for a vocabulary, and follows lengths that a damaged
file claims. How weights are packed is that package's knowledge.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import collections
import contextlib
import dataclasses
import math
import mmap
import os
import pathlib
import struct
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jpaged.models.host_arrays import MOST_THREADS, aligned, is_finite, not_finite
from jpaged.models.json_fields import shown
from jpaged.models.paths import is_address
from jpaged.models.safetensors_files import DTYPES
from jpaged.models.stored_tensor import CheckpointError, StoredTensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_AGAIN = "download or copy it again"
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
# Numbers by the format's number of their type; texts and lists have the two numbers below.
_NUMBERS = {
    number: struct.Struct(f"<{code}")
    for number, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
_TEXT, _LIST = 8, 9
_MOST_AXES = 4
# Weights at a time, for which a thread calls NumPy some ten times, and waits for its turn at each
# while another one traces steps; it takes 12 to 17 MiB beside the weights.
_CHUNK = 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class PackedTensor(StoredTensor):
    """A tensor of a GGUF file, unread.

    Attributes:
      dtype: how it is packed, in the words of the format, such as "Q4_1".
      offset: where it begins, in bytes from the beginning of the file.
      block: so many weights
      block_bytes: are packed in so many bytes.
    """

    offset: int
    block: int
    block_bytes: int


def is_gguf(path: pathlib.Path) -> bool:
    """Whether a path is meant to be a GGUF file: by its name, or by how the file begins."""
    if path.is_dir():
        return False
    if path.suffix.lower() == ".gguf":
        return True
    try:
        if is_address(path) or not path.is_file():  # of a pipe, reading would wait
            return False
        with open(path, "rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


class GgufFile:
    """A GGUF file whose header was read.

    Attributes:
      path: of the file.
      metadata: numbers, texts, and lists of one of them, by key.
      tensors: by name.
    """

    def __init__(self, path: pathlib.Path):
        """Reads the header.

        Raises:
          FileNotFoundError: if there is no such file.
          CheckpointError: if it is no such file, damaged, truncated, or a part of a model; or if
            tensors are packed in a way that cannot be read. One line.
        """
        self.path = path
        self._threads = ThreadPoolExecutor(MOST_THREADS)  # that start when there is work
        if is_address(path):
            raise CheckpointError(f"{path}: buckets serve no GGUF files: copy it to a disk")
        if not path.exists():
            raise FileNotFoundError(f"model file {str(path)!r} does not exist")
        if not path.is_file():
            raise CheckpointError(f"{path} is not a file that can be read")
        try:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                if file.read(len(_MAGIC)) != _MAGIC:
                    raise CheckpointError(
                        f"{path} is no GGUF file: it does not begin with {_MAGIC.decode()!r}; name "
                        "one, or the directory of a model"
                    )
                with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                    self._read_header(_Cursor(path, data, len(_MAGIC)), size)
        except OSError as e:
            raise CheckpointError(f"{path} cannot be read: {e.strerror or e}") from e

    def _read_header(self, at: "_Cursor", size: int) -> None:
        version = at.number(_U32)
        if version not in _VERSIONS:
            swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in _VERSIONS
            what = "is of a big-endian machine" if swapped else f"has version {version}"
            raise CheckpointError(
                f"{self.path} {what}; supported: GGUF of version {_VERSIONS}, little-endian. "
                "Convert the model anew"
            )
        num_tensors, num_keys = at.number(_U64), at.number(_U64)
        self.metadata: dict[str, Any] = {}
        for _ in range(at.count("keys", num_keys, 13)):
            key = at.text()
            if key in self.metadata:
                raise at.damage(f"key {shown(key)} stands there twice")
            self.metadata[key] = at.value(at.number(_U32))
        self._check_whole()
        infos = [_TensorInfo(at) for _ in range(at.count("tensors", num_tensors, 24))]
        alignment = self.metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise at.damage(f"general.alignment={shown(alignment)} is no power of two")
        start = -(-at.position // alignment) * alignment
        self.tensors: dict[str, PackedTensor] = {}
        for info in infos:
            if info.name in self.tensors:
                raise at.damage(f"tensor {shown(info.name)} stands there twice")
            self.tensors[info.name] = info.packed(self.path, start)
        need = max((t.offset + _num_bytes(t) for t in self.tensors.values()), default=0)
        if need > size:
            raise CheckpointError(
                f"{self.path} is truncated: its tensors end at byte {need}, and it has {size}; "
                f"{_AGAIN}"
            )

    def _check_whole(self) -> None:
        parts = self.metadata.get("split.count", 0)
        if isinstance(parts, int) and parts > 1:
            number = self.metadata.get("split.no", 0)
            raise CheckpointError(
                f"{self.path} is part {number + 1 if isinstance(number, int) else '?'} of {parts} "
                "of a model (split.count); join them first: llama-gguf-split --merge"
            )

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """Returns a tensor, dequantised to a dtype; see `begin` and `Reading.finish`."""
        return self.begin(name, dtype).finish()

    def begin(self, name: str, dtype: np.dtype, out: np.ndarray | None = None) -> "Reading":
        """Begins to read a tensor in threads.

        Args:
          name: of the tensor.
          dtype: of floating point numbers, jax's own included, that it is dequantised to.
          out: dtype[shape] to read to, contiguous; None makes an array.

        Raises:
          CheckpointError: if the package gguf is missing.
        """
        tensor, library = self.tensors[name], _library()
        kind = library.GGMLQuantizationType[tensor.dtype]
        if out is None:
            out = aligned(tensor.shape, dtype)
        weights = out.reshape(-1)  # a view

        def read_part(first: int) -> None:
            part = weights[first : first + _CHUNK]
            before, count = first // tensor.block, part.size // tensor.block
            size, offset = count * tensor.block_bytes, tensor.offset + before * tensor.block_bytes
            with open(self.path, "rb", buffering=0) as file:
                packed = np.frombuffer(os.pread(file.fileno(), size, offset), np.uint8)
            # One row: of several, the library takes sixteen at a time. Scales of a damaged file may
            # be no numbers, of which NumPy would warn.
            with np.errstate(all="ignore"):
                part[:] = library.dequantize(packed[None], kind).reshape(-1)
            if not is_finite(part):
                what = f"{self.path}: tensor {shown(name)}"
                raise not_finite(what, DTYPES.get(tensor.dtype, np.dtype(np.float32)), dtype)

        parts = (self._threads.submit(read_part, k) for k in range(0, weights.size, _CHUNK))
        return Reading(out, collections.deque(parts), f"{self.path}: tensor {shown(name)}")


class Reading:
    """A tensor that threads read."""

    def __init__(self, out: np.ndarray, parts: collections.deque[Future[None]], what: str):
        """Takes what is read to, what there is to be waited for, and what errors call it."""
        self._out, self._parts, self._what = out, parts, what

    def finish(self) -> np.ndarray:
        """Waits for it; where that ends with an error, what is not begun of it is left.

        Returns:
          dtype[shape], where the first axis is the one that the format names last.

        Raises:
          CheckpointError: if the file ends before the tensor does, or a number is not finite.
        """
        try:
            while self._parts:
                # Kept, a part would keep its error, and that, by this frame, the tensor.
                self._parts.popleft().result()
        except CheckpointError:
            raise
        except (OSError, ValueError) as e:
            raise CheckpointError(f"{self._what} cannot be read: {e}") from e
        finally:
            self.cancel()
        return self._out

    def cancel(self) -> None:
        """Leaves what is not begun, and waits for nothing."""
        while self._parts:
            self._parts.popleft().cancel()


class _TensorInfo:
    """What a header says of a tensor."""

    def __init__(self, at: "_Cursor"):
        self.name = at.text()
        num_axes = at.number(_U32)
        if not 1 <= num_axes <= _MOST_AXES:
            raise at.damage(f"tensor {shown(self.name)} has {num_axes} axes")
        self._shape = tuple(reversed([at.number(_U64) for _ in range(num_axes)]))
        self._kind, self._offset = at.number(_U32), at.number(_U64)

    def packed(self, path: pathlib.Path, start: int) -> PackedTensor:
        """With offsets from the beginning of the file."""
        library = _library()
        try:
            kind = library.GGMLQuantizationType(self._kind)
            block, block_bytes = library.GGML_QUANT_SIZES[kind]
            library.dequantize(np.zeros((1, block_bytes), np.uint8), kind)
        except (ValueError, KeyError, NotImplementedError):
            raise CheckpointError(
                f"{path}: tensor {shown(self.name)} is packed as type {self._kind}, which the "
                "package gguf cannot read; upgrade it (pip install -U gguf), or take a file with "
                "another quantisation, such as Q8_0"
            ) from None
        if self._shape[-1] % block:
            raise CheckpointError(
                f"{path} is damaged: tensor {shown(self.name)} of shape {self._shape} cannot be in "
                f"blocks of {block}; {_AGAIN}"
            )
        return PackedTensor(
            file=path,
            name=self.name,
            shape=self._shape,
            dtype=kind.name,
            offset=start + self._offset,
            block=block,
            block_bytes=block_bytes,
        )


class _Cursor:
    """Reads one thing after another, and none beyond the end.

    Attributes:
      position: of the next byte.
    """

    def __init__(self, path: pathlib.Path, data: mmap.mmap, position: int):
        self._path, self._data, self.position = path, data, position

    def damage(self, what: str) -> CheckpointError:
        """The error of a header that says what cannot be."""
        return CheckpointError(f"{self._path} is damaged or truncated: {what}; {_AGAIN}")

    @contextlib.contextmanager
    def _inside(self) -> Iterator[None]:
        try:
            yield
        except struct.error:
            raise self.damage(f"its header does not end within {len(self._data)} bytes") from None
        except UnicodeDecodeError:
            raise self.damage(f"the text at byte {self.position} is not UTF-8") from None

    def number(self, kind: struct.Struct) -> Any:
        """Reads a number."""
        with self._inside():
            (value,) = kind.unpack_from(self._data, self.position)
        self.position += kind.size
        return value

    def count(self, of: str, number: int, least: int) -> int:
        """The number, if so many things that take at least so many bytes can still follow."""
        if number * least > len(self._data) - self.position:
            raise self.damage(f"{number} {of} do not fit into its {len(self._data)} bytes")
        return number

    def text(self) -> str:
        """Reads a text."""
        return self._texts(1)[0]

    def value(self, kind: int) -> Any:
        """Reads a value of a type of the format."""
        if kind == _TEXT:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _LIST:
            raise self.damage(f"it has a value of type {kind}")
        kind, number = self.number(_U32), self.number(_U64)
        if kind == _TEXT:
            return self._texts(self.count("texts", number, _U64.size))
        if kind not in _NUMBERS:
            raise self.damage(f"it has a list of values of type {kind}")
        form = _NUMBERS[kind]
        end = self.position + self.count("numbers", number, form.size) * form.size
        values = np.frombuffer(self._data[self.position : end], form.format).tolist()
        self.position = end
        return values

    def _texts(self, number: int) -> list[str]:
        # Vocabularies are the most of a header: this is all that takes time.
        texts, at, data, length = [], self.position, self._data, _U64.unpack_from
        with self._inside():
            for _ in range(number):
                (size,) = length(data, at)
                self.position = at = at + _U64.size + size
                if at > len(data):
                    raise self.damage(f"a text of {size} bytes does not end within it")
                texts.append(data[at - size : at].decode())
        return texts


def _num_bytes(tensor: PackedTensor) -> int:
    return math.prod(tensor.shape) // tensor.block * tensor.block_bytes


def _library() -> Any:
    """The package `gguf`, which only these files need."""
    try:
        import gguf  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise CheckpointError(
            f"reading a GGUF file needs the package gguf ({e}): pip install gguf"
        ) from e
    return gguf
