# SPDX-License-Identifier: Apache-2.0
"""Where compiled programs are kept from one process to the next: jax's persistent cache."""

import errno
import logging
import os
import pathlib

import jax
from jax.experimental.compilation_cache import compilation_cache

logger = logging.getLogger(__name__)

DEFAULT_DIR = "~/.cache/jpaged/xla"
# jax's own thresholds keep out what compiles in less than a second. A step is many programs, most
# of them small, and each of them counts at the first token.
_SETTINGS = {
    "jax_persistent_cache_min_compile_time_secs": (1.0, 0.0),  # jax's default, and ours
    "jax_persistent_cache_min_entry_size_bytes": (0, -1),
    # The place of XLA's own cache for tuning on GPUs, below the directory, would be part of each
    # program's key: moved or copied to another machine, the directory would serve nobody.
    "jax_persistent_cache_enable_xla_caches": ("xla_gpu_per_fusion_autotune_cache_dir", "none"),
}


def keep_programs(directory: str | None) -> str | None:
    """Has jax keep what it compiles from now on, and look for it there, in all of this process.

    Args:
      directory: where; created if it is missing, but for an address such as gs://bucket/path, which
        needs the package that reads it. "" keeps nothing. None takes jax's own setting
        (JAX_COMPILATION_CACHE_DIR), and without one `DEFAULT_DIR`.

    Returns:
      The directory; None if nothing is kept, as by "", or because the default cannot be written,
      which is warned about.

    Raises:
      ValueError: if a directory that was given cannot be made or written.
    """
    if directory == "":
        jax.config.update("jax_enable_compilation_cache", False)
        return None
    own = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if directory is None and own is not None:
        _keep_more()
        return own or None
    place = DEFAULT_DIR if directory is None else directory
    if "://" not in place:
        try:
            place = _writable(place)
        except (OSError, ValueError, RuntimeError) as e:  # RuntimeError: no such home directory
            reason = f"compilation_cache_dir={place}: {getattr(e, 'strerror', None) or e}"
            if directory is not None:
                raise ValueError(f"{reason}; name another directory, or '' to keep none") from e
            logger.warning("%s; compiled programs are not kept", reason)
            return None
    _keep_more()
    if directory is not None:
        jax.config.update("jax_enable_compilation_cache", True)  # also after an engine with ""
    if own != place:
        jax.config.update("jax_compilation_cache_dir", place)
        compilation_cache.reset_cache()  # which it looks at once
    return place


def _writable(place: str) -> str:
    path = pathlib.Path(place).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    if not os.access(path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    return str(path)


def _keep_more() -> None:
    """Sets what is still as jax has it; what a user has set stays."""
    for name, (usual, ours) in _SETTINGS.items():
        if getattr(jax.config, name) == usual:
            jax.config.update(name, ours)
