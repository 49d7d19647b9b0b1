# SPDX-License-Identifier: Apache-2.0
"""What the scripts share: flags of settings, the compilation cache, and how programs end."""

import contextlib
import dataclasses
import errno
import gc
import inspect
import logging as python_logging
import os
import pathlib
import re
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import tqdm
from absl import app, flags, logging

from jpaged.host.compile_plan import UnplannedProgramError
from jpaged.host.config import CHOICES, EngineConfig
from jpaged.models import find
from jpaged.models.paths import path_of
from jpaged.scripts import interrupts

# A flag defined by a call of `define_engine_flags` belongs to the script that calls it, so that
# the script's --help shows it.
flags.disclaim_key_flags()

_READER_GONE = 141  # as shells report what SIGPIPE has ended
_OUTPUT_LOST = 74  # EX_IOERR of sysexits.h
_LOST = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF, errno.ENXIO, errno.EAGAIN}


class OutputError(Exception):
    """Standard output cannot be written; the message says why."""


def define_engine_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Defines a flag for every field of `EngineConfig`.

    Names, defaults and help texts are those of the fields. A second call changes nothing.

    Args:
      flag_values: where to define them.
    """
    helps, hints = _attribute_docs(EngineConfig), typing.get_type_hints(EngineConfig)
    for field in dataclasses.fields(EngineConfig):
        name = field.name
        default: Any = field.default
        if name in flag_values:
            continue
        if name in CHOICES:
            flags.DEFINE_enum(name, default, CHOICES[name], helps[name], flag_values=flag_values)
            continue
        kind = next(t for t in _union_members(hints[name]) if t is not types.NoneType)
        define: Any = {
            int: flags.DEFINE_integer,
            float: flags.DEFINE_float,
            bool: flags.DEFINE_bool,
            str: flags.DEFINE_string,
        }[kind]
        define(name, default, helps[name], flag_values=flag_values)


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


def enable_compilation_cache(flag_values: flags.FlagValues = flags.FLAGS) -> None:
    """Does what --compilation_cache_dir says, for programs that compile before they make an engine.

    Raises:
      app.UsageError: if the directory that was given cannot be made or written.
    """
    from jpaged.device.compilation_cache import keep_programs  # here, as above

    try:
        keep_programs(flag_values["compilation_cache_dir"].value)
    except ValueError as e:
        raise app.UsageError(f"--{e}") from e


def require_device() -> None:
    """Has jax find its devices, before anything is loaded or computed.

    Raises:
      app.UsageError: if there is none, as JAX_PLATFORMS names what is not there.
    """
    import jax  # as above

    try:
        jax.devices()
    except Exception as e:  # jax has errors of many kinds for it, one of them without a word
        reason = str(e).split(" (set JAX_PLATFORMS")[0] or "it did not say why"
        raise app.UsageError(
            f"jax has no device, with JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')}: "
            f"{reason}; name platforms that are there, such as JAX_PLATFORMS=cpu, or none"
        ) from e


def check_names(flag: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Raises `app.UsageError` if a flag that is a list names what is not known."""
    if unknown := sorted(set(names) - set(known)):
        raise app.UsageError(f"--{flag}={','.join(unknown)}: choose among {', '.join(known)}")


@contextlib.contextmanager
def usage_errors(prompt: str = "prompt") -> Iterator[None]:
    """Turns the library's refusals into one line for people.

    Args:
      prompt: what to call a request, before its number from 1.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # no fault of the usage: see `run`
    except OSError as e:
        raise app.UsageError(f"{e.filename}: {e.strerror}" if e.filename else str(e)) from e
    except ValueError as e:
        # Requests have numbers from 0, prompts and samples are shown to people from 1.
        text = re.sub(r"^request '(\d+)':", lambda match: f"{prompt} {int(match[1]) + 1}:", str(e))
        raise app.UsageError(text) from e


def log_to_stderr() -> None:
    """Has the library tell on standard error what it does."""
    handler = _AboveBars()
    handler.setFormatter(python_logging.Formatter("%(name)s: %(message)s"))
    logger = python_logging.getLogger("jpaged")
    logger.addHandler(handler)
    logger.propagate = False
    # --verbosity=1 also logs every compilation with its shapes.
    verbose = flags.FLAGS.verbosity > 0
    logger.setLevel(python_logging.DEBUG if verbose else python_logging.INFO)


def model_path(given: str) -> pathlib.Path:
    """The directory or file that --model names, downloaded where it is a model of a hub.

    Raises:
      FileNotFoundError: if it cannot be had.
      ValueError: if there is no such home directory, or kind of address.
    """
    try:
        return path_of(find(given))
    except ValueError as e:
        raise ValueError(f"--model={given}: {e}") from e


def run(main: Callable[[list[str]], Any]) -> None:
    """Runs `main` like `app.run`, and ends without a traceback for what is no fault of the program.

    Bad usage ends with one line and code 2, Ctrl-C with 130, a second Ctrl-C at once. Where nobody
    reads standard output any more it ends quietly with 141, and where that cannot be written, such
    as to a full disk, with one line and 74. Messages that standard error does not take are dropped.

    Only warnings are logged, unless --verbosity asks for more.

    Args:
      main: gets the arguments that are no flags; raises `app.UsageError` for bad usage.
    """

    def guarded(argv: list[str]) -> Any:
        if not flags.FLAGS["verbosity"].present:
            logging.set_verbosity(logging.WARNING)
        try:
            interrupts.raise_once()
            return main(argv)
        except (app.UsageError, UnplannedProgramError) as e:
            _exit_usage(e)
        except KeyboardInterrupt:
            _exit_interrupted()
        finally:
            interrupts.handled()
            interrupts.exit_at_once()

    interrupts.exit_at_once()
    gc.freeze()  # what was imported stays, and need not be looked at
    gc.enable()
    sys.stderr = _Forgiving(sys.stderr)
    if sys.stdout is None:
        _exit_usage("standard output is closed, so there is nowhere to write the results")
    try:
        try:
            app.run(guarded, flags_parser=_parse)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read the output, such as `head`, has had enough.
        _drop_stdout()
        sys.exit(_READER_GONE)
    except OutputError as e:
        _exit_lost(e)
    except OSError as e:
        if e.filename is not None or e.errno not in _LOST:
            raise
        _exit_lost(e.strerror)


class _AboveBars(python_logging.StreamHandler[Any]):
    """Writes lines of their own to standard error, above what progress bars are drawn there."""

    def emit(self, record: python_logging.LogRecord) -> None:
        with tqdm.tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _Forgiving:
    """A stream for messages, which are dropped where it is closed or full."""

    def __init__(self, stream: Any):
        self._stream = stream if stream is not None else open(os.devnull, "w", encoding="utf-8")

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError:
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError:
            pass

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _parse(argv: list[str]) -> list[str]:
    try:
        rest = flags.FLAGS(argv)
        if any(argument.startswith("\ufeff") for argument in rest):
            _exit_usage("a --flagfile begins with a byte order mark; save it without")
        return rest
    except UnicodeDecodeError as e:
        files = [argument for argument in argv if argument.lstrip("-").startswith("flagfile")]
        found = f"byte 0x{e.object[e.start]:02x} at position {e.start + 1}"
        _exit_usage(f"{' '.join(files)}: not UTF-8 ({found}); save the file as UTF-8")
    except (flags.Error, ValueError) as e:  # some of absl's own flags raise the second
        _exit_usage(e)
    except SystemExit as e:
        # --help has been printed, which is 1 for absl, and for a shell what was asked for.
        sys.exit(0 if e.code == 1 else e.code)


def _exit_usage(error: object) -> typing.NoReturn:
    _say(f"{error} (--help lists the flags)")
    _leave(2)


def _exit_interrupted() -> typing.NoReturn:
    """Leaves at once, as while things are taken down another Ctrl-C would be a traceback."""
    _leave(interrupts.CODE)


def _leave(code: int) -> typing.NoReturn:
    """Leaves without taking everything down first, and without waiting for threads that compile."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # or it is closed
            pass
    os._exit(code)


def _exit_lost(reason: object) -> typing.NoReturn:
    _say(f"standard output cannot be written: {reason}")
    _drop_stdout()
    sys.exit(_OUTPUT_LOST)


def _say(message: str) -> None:
    sys.stderr.write(f"{pathlib.Path(sys.argv[0]).name}: {' '.join(message.split())}\n")


def _drop_stdout() -> None:
    """What is still buffered must go somewhere, or Python complains about it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
