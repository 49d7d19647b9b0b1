# SPDX-License-Identifier: Apache-2.0
"""What the scripts' command lines share: the engine's flags, the compilation cache, bad usage."""

import dataclasses
import inspect
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable
from typing import Any

from absl import app, flags, logging

from jpaged.config import CHOICES, EngineConfig

# A flag defined by a call of `define_engine_flags` belongs to the script that calls it, so that
# the script's --help shows it.
flags.disclaim_key_flags()

_DEFAULT_CACHE_DIR = "~/.cache/jpaged/xla"


def define_engine_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for every field of `EngineConfig`, and --compilation_cache_dir.

    Names, defaults and help texts are those of the fields. A second call changes nothing.

    Args:
      flag_values: where to define them.
    """
    helps = _attribute_docs(EngineConfig)
    hints = typing.get_type_hints(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        if field.name in flag_values:
            continue
        (kind,) = [t for t in _union_members(hints[field.name]) if t is not types.NoneType]
        name, text = field.name, helps[field.name]
        default: Any = field.default
        if name in CHOICES:
            flags.DEFINE_enum(name, default, CHOICES[name], text, flag_values=flag_values)
            continue
        define: Any = {
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            bool: flags.DEFINE_bool,
            str: flags.DEFINE_string,
        }[kind]
        define(name, default, text, flag_values=flag_values)
    if "compilation_cache_dir" not in flag_values:
        flags.DEFINE_string(
            "compilation_cache_dir",
            _DEFAULT_CACHE_DIR,
            "Where compiled programs are kept for the next start; empty keeps none.",
            flag_values=flag_values,
        )


def engine_config_from_flags(flag_values: flags.FlagValues = flags.FLAGS) -> EngineConfig:
    """Returns the config that the flags of `define_engine_flags` describe.

    Raises:
      app.UsageError: if a value is out of range.
    """
    names = [field.name for field in dataclasses.fields(EngineConfig)]
    values: dict[str, Any] = {name: flag_values[name].value for name in names}
    try:
        return EngineConfig(**values)
    except ValueError as e:
        raise app.UsageError(str(e)) from e


def enable_compilation_cache(flag_values: flags.FlagValues = flags.FLAGS) -> pathlib.Path | None:
    """Turns on JAX's persistent cache in --compilation_cache_dir, for small programs too.

    Returns:
      The directory, made where it was missing; None if the flag is empty.

    Raises:
      app.UsageError: if the directory cannot be made.
    """
    directory = flag_values["compilation_cache_dir"].value
    if not directory:
        return None
    import jax  # here, so that the flags can be used in a process without jax

    path = pathlib.Path(directory).expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise app.UsageError(f"--compilation_cache_dir={directory}: {e.strerror}") from e
    jax.config.update("jax_compilation_cache_dir", str(path))
    # A step is many programs, most of them small: each of them counts at the first token.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return path


def check_names(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises `app.UsageError` if a flag that is a list names what is not known."""
    if unknown := sorted(set(names) - set(known)):
        raise app.UsageError(f"--{flag}={','.join(unknown)}: choose among {', '.join(known)}")


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs `main` like `app.run`; bad usage ends with one line and code 2, Ctrl-C with 130.

    Where nobody reads standard output any more, it ends quietly with 141.

    Only warnings are logged, unless --verbosity asks for more.

    Args:
      main: gets the arguments that are no flags; raises `app.UsageError` for bad usage.
    """

    def guarded(argv: list[str]) -> Any:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            result = main(argv)
            sys.stdout.flush()
            return result
        except app.UsageError as e:
            _exit_usage(e)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:
            # Whoever read the output, such as `head`, has had enough. What is still buffered must
            # go somewhere, or Python complains about it at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)

    app.run(guarded, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
    try:
        return flags.FLAGS(argv)
    except flags.Error as e:
        _exit_usage(e)


def _exit_usage(error: Exception) -> typing.NoReturn:
    message = " ".join(str(error).split())
    sys.stderr.write(f"{pathlib.Path(sys.argv[0]).name}: {message} (--help lists the flags)\n")
    sys.exit(2)


def _union_members(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def _attribute_docs(cls: type) -> dict[str, str]:
    """The "Attributes:" of a class's docstring, one paragraph an attribute."""
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    docs: dict[str, str] = {field.name: "" for field in dataclasses.fields(cls)}
    for match in re.finditer(r"^  (\w+): (.*(?:\n    .*)*)", section, re.MULTILINE):
        text = " ".join(match[2].split())
        docs[match[1]] = text[:1].upper() + text[1:]
    return docs
