# SPDX-License-Identifier: Apache-2.0
"""The command `jpaged`: runs one of the programs; imports nothing that they do not need."""

import gc
import importlib.machinery
import importlib.util
import sys
import types
import typing

import jpaged

# What each does, as its docstring begins.
PROGRAMS = {
    "generate": "Generates text from prompts.",
    "batch": "Runs files of requests, and goes on where it was stopped.",
    "chat": "Chats with a model in the terminal.",
    "score": "Says how likely a model finds completions that are given.",
    "convert": "Converts a model between safetensors and Orbax, and to another dtype.",
    "calibrate": "Finds the scales of int8 and float8 pages on prompts of yours.",
    "benchmark": "Measures throughput, latency and how well the page pool is used.",
    "conformance": "Holds an implementation of the paged-attention contract to dense float64.",
    "plan": "Says what a model and its pages take of a chip's memory, without weights or device.",
    "warmup": "Compiles what a job will run, before it runs, and says what that takes.",
    "simulate": "Serves requests without a model, with pages and without, by a cost model.",
    "view": "Makes one HTML page of a record: who had which page when, and who lost theirs.",
}


def main() -> None:
    """Runs `jpaged PROGRAM [FLAGS]`; without a program it says which there are."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in PROGRAMS:
        _run(f"jpaged.scripts.{name}", [f"jpaged {name}", *arguments])
    elif name in ("--help", "-h", "help"):
        print(_usage())
    elif name == "--version":
        print(f"jpaged {jpaged.__version__}")
    else:
        sys.exit(_refuse(name))


def _usage() -> str:
    width = max(map(len, PROGRAMS))
    programs = "\n".join(f"  {name:{width}}  {text}" for name, text in PROGRAMS.items())
    return (
        f"{(jpaged.__doc__ or '').strip()}\n\nusage: jpaged PROGRAM [FLAGS]\n\n{programs}\n\n"
        "`jpaged PROGRAM --help` lists the flags of a program; `jpaged --version` says which "
        "version this is."
    )


def _refuse(name: str) -> int:
    programs = ", ".join(PROGRAMS)
    print(f"jpaged: there is no program {name!r}: choose among {programs}", file=sys.stderr)
    return 2


def _run(module: str, argv: list[str]) -> None:
    """Runs a module as `python -m` does, but under the name that the user typed."""
    gc.disable()  # until `flags.run`: what is imported stays, and need not be looked at
    spec = importlib.util.find_spec(module)
    assert spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader)
    code = typing.cast("types.CodeType", spec.loader.get_code(module))
    program = types.ModuleType("__main__")
    program.__dict__.update(__file__=spec.origin, __package__="jpaged.scripts")
    # absl finds the flags of the program, and its docstring, by these.
    sys.modules["__main__"], sys.argv = program, argv
    exec(code, program.__dict__)
