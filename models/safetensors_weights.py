# SPDX-License-Identifier: Apache-2.0
"""Reads parameters out of safetensors, block by block, each device the part that it has."""

import contextlib
import dataclasses
import functools
import math
import pathlib
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models.config import ModelConfig
from jpaged.models.families import source_of
from jpaged.models.families.base import Source
from jpaged.models.fitting import check_dtypes, check_size, check_tensors, wanted_shapes
from jpaged.models.host_arrays import MOST_THREADS, aligned, is_finite, not_finite
from jpaged.models.json_fields import shown
from jpaged.models.safetensors_files import (
    DTYPES,
    damage,
    offsets,
    reading,
    stored_tensors,
)
from jpaged.models.stored_tensor import MemoryOf, StoredTensor, no_memory

# Of a file, what is read, converted and checked at once: what a core's cache holds.
_BLOCK_BYTES = 2**20
_MOST_MAPPED_BYTES = 2**24


class SafetensorsWeights:
    """The parameters of a directory of safetensors, unread.

    Attributes:
      shapes: of the parameters that are there, by path.
      dtypes: in which they are stored; what is packed is unpacked to bfloat16, exactly.
    """

    def __init__(self, directory: pathlib.Path, config: ModelConfig):
        """Finds the tensors and holds them against the model.

        Raises:
          FileNotFoundError: if there are none, or a file that is named is missing.
          CheckpointError: if they are not this model's, or a file is damaged.
        """
        stored = stored_tensors(directory)
        check_size(str(directory), config, stored)
        # A layer costs a checkpoint nine tensors or more, so this is no longer than what was read.
        self.shapes = wanted_shapes(config, stored)
        self._sources = {
            path: source_of(path, shape, config) for path, shape in self.shapes.items()
        }
        packed = {name for s in self._sources.values() if s.scales for name in s.shapes}
        check_dtypes({k: v for k, v in stored.items() if k in packed}, ("U8",))
        check_dtypes({k: v for k, v in stored.items() if k not in packed}, tuple(DTYPES))
        wanted = {name: shape for s in self._sources.values() for name, shape in s.shapes.items()}
        check_tensors(str(directory), wanted, stored)
        self._stored = stored
        self.dtypes = {path: self._dtype_of(source) for path, source in self._sources.items()}

    def _dtype_of(self, source: Source) -> np.dtype:
        """The smallest dtype that holds all of a parameter's tensors."""
        if source.scales is not None:
            return np.dtype(jnp.bfloat16)
        dtypes = {DTYPES[self._stored[name].dtype] for name in source.names}
        return dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read(
        self, targets: Mapping[str, jax.ShapeDtypeStruct], memory_of: MemoryOf = no_memory
    ) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
        """Reads parameters, one at a time.

        Args:
          targets: dtype and sharding of each that is wanted, by path. Of a parameter that is split
            over devices, each device's part is read by itself.
          memory_of: memory of the host that some are read to.

        Yields:
          Paths and arrays, in the order of the targets.

        Raises:
          CheckpointError: if a file is damaged, or a number is not finite.
        """
        with _TensorReader(self._stored) as reader:
            for path, target in targets.items():
                memory = memory_of(path)
                if memory is not None:
                    whole = tuple(slice(0, size) for size in target.shape)
                    self._fill(memory, reader, self._sources[path], whole)
                    yield path, memory
                    continue
                part = functools.partial(self._part, reader, path, target.shape, target.dtype)
                assert target.sharding is not None
                # Waited for, or a slow device would have the host hold all that was read.
                array = jax.make_array_from_callback(target.shape, target.sharding, part)
                yield path, array.block_until_ready()

    def _part(
        self,
        reader: "_TensorReader",
        path: str,
        shape: tuple[int, ...],
        dtype: np.dtype,
        index: tuple[slice, ...] | None,
    ) -> np.ndarray:
        assert index is not None
        bounds = tuple(
            slice(*axis.indices(size)[:2]) for axis, size in zip(index, shape, strict=True)
        )
        out = aligned(tuple(axis.stop - axis.start for axis in bounds), dtype)
        self._fill(out, reader, self._sources[path], bounds)
        return out

    def _fill(
        self, out: np.ndarray, reader: "_TensorReader", source: Source, index: tuple[slice, ...]
    ) -> None:
        """Reads the part of a parameter that an index names into an array of its shape."""
        rows, rest = index[0], index[1:]
        if source.stacked:
            for place, number in enumerate(range(rows.start, rows.stop)):
                one = dataclasses.replace(source, names=(source.names[number],), stacked=False)
                self._fill(out[place], reader, one, rest)
            return
        (name,) = source.names
        # Whole rows are bytes that follow each other, which threads read from anywhere.
        whole = all(x == slice(0, n) for x, n in zip(rest, source.shape[1:], strict=True))
        by_rows = source.unpack is None and (whole or source.view is not None)
        row_bytes = math.prod(source.shape[1:]) * reader.dtype(name).itemsize
        step = max(1, _BLOCK_BYTES // max(row_bytes, 1))
        first = 0 if source.part is None else source.part.start

        def read_block(start: int) -> None:
            stop = min(start + step, rows.stop)
            block = slice(first + start, first + stop)
            part = out[start - rows.start : stop - rows.start]
            if by_rows and source.view is None and reader.dtype(name) == part.dtype:
                found = reader.rows(name, block, part)
            elif source.unpack is not None and source.scales is not None:
                scales = reader.read(source.scales[0], (block,))
                unpacked = source.unpack(reader.read(name, (block,)), scales, out.dtype)
                found = np.asarray(unpacked)[:, *rest]
            elif source.view is not None:
                found = source.view(reader.rows(name, block))[:, *rest]
            elif by_rows:
                found = reader.rows(name, block)
            else:
                found = reader.read(name, (block, *rest))
            if found is not part:
                with np.errstate(over="ignore", invalid="ignore"):  # told below, by name
                    part[...] = found
            if not is_finite(part):
                what = f"{self._stored[name].file}: tensor {shown(self._stored[name].name)}"
                raise not_finite(what, found.dtype, part.dtype)

        starts = range(rows.start, rows.stop, step)
        list((reader.threads.map if by_rows and len(starts) > 1 else map)(read_block, starts))


class _TensorReader:
    """Reads parts of tensors, and gives the memory that files take back as it goes.

    The library maps a file into memory, and what it read of it counts as the process's until it is
    closed: files are opened anew each time so much has been read. Whole rows are read past it, for
    it copies all once more, and one thread at a time.

    Attributes:
      threads: that call `rows` beside each other.
    """

    def __init__(self, stored: Mapping[str, StoredTensor]):
        self._stored = stored
        self.threads = ThreadPoolExecutor(MOST_THREADS)  # that start when there is work
        self._offsets: dict[pathlib.Path, dict[str, int]] = {}
        self._lock = threading.Lock()
        self._stack = contextlib.ExitStack()
        self._readers: dict[pathlib.Path, Any] = {}
        self._num_bytes = 0

    def __enter__(self) -> "_TensorReader":
        return self

    def __exit__(self, *error: object) -> None:
        self.threads.shutdown()
        self._close()

    def dtype(self, name: str) -> np.dtype:
        """Of a tensor; bytes where it is packed."""
        return DTYPES.get(self._stored[name].dtype, np.dtype(np.uint8))

    def rows(self, name: str, rows: slice, out: np.ndarray | None = None) -> np.ndarray:
        """Whole rows of a tensor, in its own dtype.

        Args:
          name: of the tensor.
          rows: which.
          out: contiguous, of the shape and dtype of the rows, to be read to; None makes an array.

        Raises:
          CheckpointError: if its file is damaged.
        """
        stored = self._stored[name]
        if out is None:
            out = np.empty((rows.stop - rows.start, *stored.shape[1:]), self.dtype(name))
        data = out.reshape(-1).view(np.uint8).data
        with self._lock:
            if stored.file not in self._offsets:
                self._offsets[stored.file] = offsets(stored.file)
        offset = self._offsets[stored.file][stored.name]
        offset += rows.start * math.prod(stored.shape[1:]) * out.itemsize
        with damage(stored.file), open(stored.file, "rb", buffering=0) as file:
            file.seek(offset)
            while data:
                count = file.readinto(data)
                if not count:
                    raise OSError(f"it ends at byte {file.tell()}, within a tensor")
                data = data[count:]
        return out

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """Part of a tensor, in its own dtype.

        Raises:
          CheckpointError: if its file is damaged.
        """
        stored = self._stored[name]
        file = stored.file
        if file not in self._readers:
            self._readers[file] = self._stack.enter_context(reading(file))
        with damage(file):
            found = self._readers[file].get_slice(stored.name)[index]
        self._num_bytes += found.nbytes
        if self._num_bytes > _MOST_MAPPED_BYTES:
            self._close()
        return found

    def _close(self) -> None:
        self._stack.close()
        self._readers, self._num_bytes = {}, 0
