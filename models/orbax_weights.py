# SPDX-License-Identifier: Apache-2.0
"""Parameters out of Orbax checkpoints and into them, a bounded number of bytes at a time."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from jpaged.models.config import ModelConfig
from jpaged.models.decoder import Params
from jpaged.models.fitting import (
    check_dtypes,
    check_size,
    check_tensors,
    wanted_shapes,
)
from jpaged.models.host_arrays import is_finite, not_finite
from jpaged.models.json_fields import shown
from jpaged.models.param_trees import flat, insert
from jpaged.models.stored_tensor import (
    WEIGHT_DTYPES,
    CheckpointError,
    MemoryOf,
    StoredTensor,
    no_memory,
)

# Parameters are restored in batches: a share of all, as each takes Orbax some 20 ms.
_BATCH_SHARE = 16
_LEAST_BATCH_BYTES, _MOST_BATCH_BYTES = 2**23, 2**30
# What is read at once of an array that is split over devices otherwise than when it was saved.
_SAVED = ocp.SaveArgs(chunk_byte_size=2**26)


class OrbaxWeights:
    """The parameters of an Orbax checkpoint, unread.

    Attributes:
      shapes: of the parameters that are there, by path.
      dtypes: in which they are stored.
    """

    def __init__(self, directory: Any, config: ModelConfig):
        """Reads what the checkpoint says of itself, and holds it against the model.

        Args:
          directory: the checkpoint's, resolved; a path of pathlib's or etils.epath's.
          config: the model's.

        Raises:
          CheckpointError: if it is not this model's, or damaged.
        """
        self._directory = directory
        with _checkpointer() as checkpointer, _damage(directory):
            self._metadata = checkpointer.metadata(directory).item_metadata.tree
            stored = {
                path: StoredTensor(
                    file=directory,
                    name=path,
                    shape=tuple(int(axis) for axis in leaf.shape),
                    dtype=np.dtype(leaf.dtype).name,
                )
                for path, leaf in flat(self._metadata)
            }
        check_dtypes(stored, WEIGHT_DTYPES)
        check_size(str(directory), config, stored)
        self.shapes = wanted_shapes(config, stored)
        check_tensors(str(directory), self.shapes, stored)
        self.dtypes = {path: np.dtype(tensor.dtype) for path, tensor in stored.items()}

    def read(
        self, targets: Mapping[str, jax.ShapeDtypeStruct], memory_of: MemoryOf = no_memory
    ) -> Iterator[tuple[str, jax.Array | np.ndarray]]:
        """Reads parameters, a batch at a time.

        Args:
          targets: dtype and sharding of each that is wanted, by path, whatever the checkpoint was
            saved from.
          memory_of: memory of the host that some are copied to.

        Yields:
          Paths and arrays, in the order of the targets.

        Raises:
          CheckpointError: if a file is damaged, or a number is not finite.
        """
        with _checkpointer() as checkpointer:
            for batch in _batches(targets):
                found = self._restored(checkpointer, batch)
                for path in batch:
                    array = found.pop(path)
                    if not _all_finite(array):
                        what = f"{self._directory}: tensor {shown(path)}"
                        raise not_finite(what, self.dtypes[path], array.dtype)
                    memory = memory_of(path)
                    if memory is not None:
                        memory[...] = array
                        array = memory
                    yield path, array

    def _restored(
        self, checkpointer: ocp.Checkpointer, batch: Mapping[str, jax.ShapeDtypeStruct]
    ) -> dict[str, jax.Array]:
        def item(keys, leaf) -> Any:
            return batch.get(
                jax.tree_util.keystr(keys, simple=True, separator="/"), ocp.PLACEHOLDER
            )

        items = jax.tree_util.tree_map_with_path(item, self._metadata)
        how = jax.tree.map(
            lambda item: (
                ocp.RestoreArgs()
                if item is ocp.PLACEHOLDER
                else ocp.ArrayRestoreArgs(
                    restore_type=jax.Array, dtype=item.dtype, sharding=item.sharding
                )
            ),
            items,
        )
        with _damage(self._directory):
            restored = checkpointer.restore(
                self._directory, args=ocp.args.PyTreeRestore(item=items, restore_args=how)
            )
            return {path: leaf for path, leaf in flat(restored) if path in batch}


def save(directory: Any, params: Params) -> None:
    """Writes a checkpoint in place of one that may be there.

    Args:
      directory: the checkpoint's, resolved.
      params: a tree of arrays, on whatever devices.
    """
    how = jax.tree.map(lambda leaf: _SAVED, params)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(directory, params, save_args=how, force=True)


def save_read(
    directory: Any,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    read: Callable[[Mapping[str, jax.ShapeDtypeStruct]], Iterator[tuple[str, jax.Array]]],
) -> None:
    """Writes a checkpoint of parameters as they are read, a batch in memory at a time.

    Args:
      directory: the checkpoint's, resolved; nothing lies there.
      targets: the parameters, by path.
      read: reads them in the order of its argument.
    """
    tree: Params = {}
    for path, target in targets.items():
        insert(tree, path, _Unread(path, target.shape, target.dtype))
    how = jax.tree.map(lambda leaf: _SAVED, tree)
    # Orbax writes in the order of the tree.
    ordered = {path: targets[path] for path, _ in flat(tree)}
    registry = ocp.type_handlers.create_type_handler_registry(
        (_Unread, _ReadingHandler(ordered, read(ordered))),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(tree, save_args=how))


@dataclasses.dataclass(frozen=True)
class _Unread:
    """Stands for an array that is still to be read, in a tree that is saved."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype


class _ReadingHandler(ocp.type_handlers.NumpyHandler):
    """Reads what it is to write when it writes it."""

    def __init__(
        self,
        targets: Mapping[str, jax.ShapeDtypeStruct],
        arrays: Iterator[tuple[str, jax.Array]],
    ):
        super().__init__()
        self._targets, self._arrays = targets, arrays

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> Any:
        places = {value.path: place for place, value in enumerate(values)}
        for batch in _batches({value.path: self._targets[value.path] for value in values}):
            found = [next(self._arrays) for _ in batch]
            assert [path for path, _ in found] == list(batch)
            at = [places[path] for path in batch]
            writing = await super().serialize(
                [np.asarray(array) for _, array in found],
                [infos[place] for place in at],
                args and [args[place] for place in at],
            )
            for written in writing:
                written.result()
        return []


def _checkpointer() -> ocp.Checkpointer:
    return ocp.Checkpointer(ocp.PyTreeCheckpointHandler())


@contextlib.contextmanager
def _damage(directory: Any) -> Iterator[None]:
    """Says in one line what Orbax and TensorStore say of a damaged checkpoint in pages."""
    try:
        yield
    except Exception as e:  # whatever is damaged, another library's error surfaces
        raise CheckpointError(
            f"{directory} is not a readable Orbax checkpoint: a file is missing, damaged or "
            "truncated; copy it again, or save it anew"
        ) from e


def _batches(
    targets: Mapping[str, jax.ShapeDtypeStruct],
) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    sizes = {path: math.prod(t.shape) * t.dtype.itemsize for path, t in targets.items()}
    share = sum(sizes.values()) // _BATCH_SHARE
    most = min(max(share, _LEAST_BATCH_BYTES), _MOST_BATCH_BYTES)
    batch: dict[str, jax.ShapeDtypeStruct] = {}
    num_bytes = 0
    for path, target in targets.items():
        if batch and num_bytes + sizes[path] > most:
            yield batch
            batch, num_bytes = {}, 0
        batch[path] = target
        num_bytes += sizes[path]
    if batch:
        yield batch


def _all_finite(array: jax.Array) -> bool:
    if jax.default_backend() != "cpu":
        return bool(jnp.isfinite(array).all())
    # Without a program to compile, for each shape.
    return all(is_finite(np.asarray(shard.data)) for shard in array.addressable_shards)
