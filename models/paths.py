# SPDX-License-Identifier: Apache-2.0
"""Paths of models: on a disk, or the address of a bucket, such as gs://bucket/model."""

import os
import pathlib
from typing import cast

from etils import epath


def path_of(path: str | os.PathLike[str]) -> pathlib.Path:
    """The path that is meant, with its "~" expanded; an address is a path of etils.epath's.

    Raises:
      ValueError: if there is no home directory to stand for "~", or no such kind of address.
    """
    try:
        if is_address(path):
            return cast(pathlib.Path, epath.Path(path))  # whose methods have pathlib's names
        return pathlib.Path(path).expanduser()
    except KeyError:
        raise ValueError(
            f"{os.fspath(path)!r} is no address that is known: those of buckets begin with gs://, "
            "s3:// or az://"
        ) from None
    except RuntimeError as e:
        raise ValueError(f"{os.fspath(path)!r}: {e}") from None


def is_address(path: str | os.PathLike[str]) -> bool:
    """Whether a path is in a bucket."""
    return "://" in os.fspath(path)


def resolved(path: pathlib.Path) -> pathlib.Path:
    """A path without links and relative parts, which an address has none of."""
    return path if is_address(path) else path.resolve()


def is_there(path: pathlib.Path) -> bool:
    """Whether something lies there, be it a link that leads nowhere."""
    return path.exists() if is_address(path) else os.path.lexists(path)


def find_address(address: str) -> pathlib.Path:
    """The path of an address, once it has been reached.

    Raises:
      FileNotFoundError: if it cannot be: one line that says why.
      ValueError: if it is of no known kind.
    """
    path = path_of(address)
    try:
        path.exists()
    except ImportError as e:
        raise FileNotFoundError(
            f"{address}: {e}: pip install gcsfs for gs://, s3fs for s3://, adlfs for az://"
        ) from e
    except Exception as e:  # of whatever serves it
        reason = " ".join(str(e).split())[:200]
        raise FileNotFoundError(f"{address} cannot be reached: {type(e).__name__}: {reason}") from e
    return path
