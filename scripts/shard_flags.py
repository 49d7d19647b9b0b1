# SPDX-License-Identifier: Apache-2.0
"""Flags of the shards that a job is done in, and which of them a process does."""

from typing import Any, NamedTuple

import jax
from absl import flags

from jpaged.pallas_kernels.versions import launched_processes

# As in `flags`.
flags.disclaim_key_flags()


class Shards(NamedTuple):
    """How a job is divided.

    Attributes:
      number: of shards; 1 where there are none.
      own: the one that this process does, from 0; None for all rows, or to merge.
      merges: whether it makes one output of those of all shards, and does nothing else.
    """

    number: int
    own: int | None
    merges: bool


def define_shard_flags() -> None:
    """Defines them."""
    flags.DEFINE_integer(
        "num_shards", 1, "Parts that rows are in, by their ids, for as many machines.", 1
    )
    flags.DEFINE_integer(
        "shard",
        None,
        "Run this part alone, from 0. Its output is --output with .K-of-N behind, such as "
        "results.jsonl.0-of-2.",
    )
    flags.DEFINE_bool(
        "distributed",
        False,
        "In place of both: as many shards as jax.distributed would find processes (of Slurm, Open "
        "MPI, Kubernetes, Cloud TPU), each its own, with the GPU that it would have there.",
    )
    flags.DEFINE_bool(
        "merge",
        False,
        "Run nothing, and make --output of the outputs of all --num_shards: the bytes of a job in "
        "one.",
    )


def shards_from_flags() -> Shards:
    """Returns what they say.

    Raises:
      ValueError: if they do not go together, or no launcher has started this process.
    """
    number: Any = flags.FLAGS["num_shards"].value
    own, merges = flags.FLAGS["shard"].value, bool(flags.FLAGS["merge"].value)
    is_given = flags.FLAGS["num_shards"].present
    if flags.FLAGS["distributed"].value:
        if is_given or own is not None or merges:
            raise ValueError(
                "--distributed says what --num_shards and --shard would, and merges nothing: give "
                "it alone, and merge with --num_shards and --merge when all shards are done"
            )
        return Shards(*_launched(), False)
    if own is None and not merges and is_given:
        raise ValueError(f"--num_shards={number} needs --shard, 0 to {number - 1}, or --merge")
    if (own is not None or merges) and not is_given:
        raise ValueError("--shard and --merge need --num_shards, the same for all of a job")
    if own is not None and merges:
        raise ValueError("--shard and --merge exclude each other: merge when all shards are done")
    if own is not None and not 0 <= own < number:
        raise ValueError(f"--shard={own} must be between 0 and {number - 1}, as is --num_shards")
    return Shards(number, own, merges)


def _launched() -> tuple[int, int]:
    """How many processes a launcher has started, and which this is, as jax finds it.

    Nothing is started for it. Processes of jax.distributed end when one of them does, which those
    of a job must not, whose shards take longer and shorter.
    """
    number, own, devices = launched_processes()
    if number is None or own is None:
        raise ValueError(
            "--distributed: no launcher that jax knows has started this process (Slurm, Open MPI, "
            "Kubernetes, Cloud TPU): give --num_shards and --shard"
        )
    if devices:  # as jax.distributed does
        visible = ",".join(map(str, devices))
        jax.config.update("jax_cuda_visible_devices", visible)
        jax.config.update("jax_rocm_visible_devices", visible)
    return number, own
