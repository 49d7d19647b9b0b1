# SPDX-License-Identifier: Apache-2.0
"""Measures on this device what a release is held to, the most telling figures first.

    python -m scripts.kernels.device_figures --output_dir=DIR
    python -m scripts.kernels.device_figures --output_dir=DIR --transformers_python=PATH
    python -m scripts.kernels.device_figures --output_dir=DIR --smoke     # a rehearsal, on a CPU

Each part has processes of its own and a share of --budget_s, and what it leaves the next may use:

  * `steps`: llama-3.2-1b's shape, random weights in bfloat16: decode steps of 64 sequences and of
    1, in bursts, 256 tokens of prompt and 64 of output each, and prefill of prompts of 2,048
    tokens; the same again, profiled, with one step a dispatch; then both of 256 sequences;
  * `kernels`: attention of 1, 8 and 64 rows at 4,096 tokens and of 2,048 tokens of prefill, beside
    cuDNN's and PyTorch's (see `benchmark_kernels`);
  * `transformers`, with --transformers_python, an interpreter that has torch and transformers: the
    same shape and lengths, eager and with a compiled static cache;
  * `narrow`, last, as no GPU has run it: decode with keys as the rows of products (`gpu-narrow`),
    of the same rows, and of 300 tokens with the model's head_dim beside the kernel in use.

figures.json in --output_dir has each figure as soon as there is one, so that a run that is cut
short keeps what it has; profiles are in the folders profile_ROWS. The last line of standard output
is one JSON object, as figures.json has it: `device`, `versions`, `parts` (each one's status and
seconds), `figures` by name, `errors` of what could not be measured, if any, and `targets`: by name
`value`, `target` and `reached`, null where the figure is missing. The exit code is 1 if a part
failed or was cut short.
"""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

# Before jax looks at it; else it claims most memory, and what runs beside it has the rest.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from absl import app, flags

from jpaged.models.config import ModelConfig, dense_config
from jpaged.models.shapes import SHAPES
from jpaged.scripts.flags import require_device, run
from jpaged.scripts.kernels.figures import Figures, kernel_figures, transformers_figures

# transformers' static cache takes more than a minute to compile.
PARTS = MappingProxyType({"steps": 0.3, "kernels": 0.26, "transformers": 0.24, "narrow": 0.2})
_ROOT = pathlib.Path(__file__).resolve().parents[2]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Size:
    """How large the measurement is.

    Attributes:
      model: whose weights are random.
      dtype: of weights.
      rows: sequences of a decode step, the most telling first; of the first two all is measured
        before the others.
      prompt_len, output_len: tokens of each.
      prefill_len, prefill_requests: of prefill alone.
      prefill_tokens: of a step, at most.
      profile_steps: steps that a profile has.
      kernels: flags of `benchmark_kernels`.
      narrow: likewise, by what ends the names of their figures.
    """

    model: ModelConfig
    dtype: str
    rows: tuple[int, ...]
    prompt_len: int
    output_len: int
    prefill_len: int
    prefill_requests: int
    prefill_tokens: int
    profile_steps: int
    kernels: tuple[str, ...]
    narrow: Mapping[str, tuple[str, ...]]

    @property
    def step_shapes(self) -> str:
        """Few, as each takes seconds to compile: decode of `rows`, and prefill beside others."""
        some = sorted(self.rows)
        prefill = [f"{self.prefill_tokens}x{rows}" for rows in some[1:]]
        return ",".join([*(f"{rows}x{rows}" for rows in some), *prefill])


def size_of(*, smoke: bool) -> Size:
    """The real one, or a small one that takes a CPU seconds."""
    if not smoke:
        return Size(
            model=SHAPES["llama-3.2-1b"],
            dtype="bfloat16",
            rows=(64, 1, 256),
            prompt_len=256,
            output_len=64,
            prefill_len=2048,
            prefill_requests=8,
            prefill_tokens=2048,
            profile_steps=24,
            kernels=(
                "--rows=64,8,1",
                "--contexts=4096",
                "--steps=1*2048@2048",
                "--peers=cudnn,torch_sdpa",
            ),
            narrow={
                "_gpu-narrow": (
                    *("--backends=gpu-narrow", "--peers=", "--steps="),
                    *("--rows=64,8,1", "--contexts=4096"),
                ),
                "_short": (
                    *("--backends=gpu,gpu-narrow", "--peers=", "--steps="),
                    *("--rows=64,1", "--contexts=300", "--head_dim=64"),
                ),
            },
        )
    few = ("--head_dim=16", "--num_q_heads=4", "--num_kv_heads=2", "--dtype=float32")
    tiny = dense_config(
        family="LlamaForCausalLM",
        vocab_size=128,
        hidden_size=32,
        intermediate_size=64,
        num_layers=2,
        num_q_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-6,
        rope_theta=10000.0,
        tie_word_embeddings=True,
        max_position_embeddings=256,
    )
    return Size(
        model=tiny,
        dtype="float32",
        rows=(2, 1),
        prompt_len=4,
        output_len=12,
        prefill_len=32,
        prefill_requests=2,
        prefill_tokens=32,
        profile_steps=4,
        kernels=(
            *("--rows=1,2", "--contexts=32", "--steps=1*8@8", "--peers=cudnn", "--run_s=0.001"),
            *few,
        ),
        narrow={
            "_short": ("--rows=1", "--contexts=8", "--steps=", "--peers=", "--run_s=0.001", *few)
        },
    )


def measure_steps(size: Size, directory: pathlib.Path, figures: Figures) -> bool:
    """Decode steps by number of sequences, each beside its floor, and prefill.

    Returns:
      Whether all could be measured; what could not has its reason in `errors`.
    """
    import jax

    from jpaged import Engine, EngineConfig, SamplingParams
    from jpaged.measure.breakdown import draw
    from jpaged.measure.floor import floor_of
    from jpaged.measure.machine import CompileClock, hardware, versions
    from jpaged.measure.profile import ProfileConfig
    from jpaged.measure.rates import copy_rates, product_rate
    from jpaged.measure.runs import measure
    from jpaged.models.decoder import Decoder
    from jpaged.simulation.lengths import Uniform
    from jpaged.simulation.workload import Workload, make_workload

    figures.add("device", **hardware())
    figures.add("versions", **versions())
    clock, params = CompileClock(), SamplingParams(temperature=0.0, seed=0, ignore_eos=True)
    dtype = jax.numpy.dtype(size.dtype)
    rates = {"copy_bytes_per_s": max(copy_rates().values())}
    rates["product_flops_per_s"] = product_rate(dtype)
    figures.add("figures", **rates)
    weights = Decoder(size.model).init(jax.random.key(0), dtype)
    config = EngineConfig(
        dtype=size.dtype,
        max_num_seqs=max(size.rows),
        max_num_batched_tokens=size.prefill_tokens,
        max_model_len=max(size.prompt_len + size.output_len, size.prefill_len + 1),
        prefix_cache=False,
        step_shapes=size.step_shapes,
    )
    bursts = Engine(size.model, weights, config)

    def workload(count: int, prompt_len: int, output_len: int) -> Workload:
        return make_workload(
            count,
            Uniform(prompt_len, prompt_len),
            Uniform(output_len, output_len),
            max_model_len=prompt_len + output_len,
            vocab_size=size.model.vocab_size,
            seed=0,
        )

    errors: dict[str, str] = {}

    def attempt(name: str, measurement: Callable[..., Any], *args: Any) -> None:
        try:
            measurement(*args)
        except Exception as e:  # whatever it is, others may still be measured
            errors[name] = f"{type(e).__name__}: {e}"
            figures.add("errors", **errors)

    def decode(rows: int) -> None:
        work = workload(rows, size.prompt_len, size.output_len)
        report = measure(bursts, work, params, clock)
        pages = rows * -(-(size.prompt_len + size.output_len // 2) // config.page_size)
        page_bytes = pages * bursts.stats().page_bytes
        sizes = {"tokens": rows, "samples": rows, "page_bytes": page_bytes}
        floor_us = 1e6 * floor_of(size.model, dtype, **sizes, **rates).s
        step_us = 1e6 * report["mean_decode_step_s"]
        found = {"step_us": step_us, "floor_us": floor_us, "step_over_floor": step_us / floor_us}
        found["tokens_per_s"] = report["output_tokens_per_s"]
        found["compile_s"] = report["warmup"]["compile_s"]
        figures.add("figures", **{f"{name}_{rows}": value for name, value in found.items()})

    prompts = workload(size.prefill_requests, size.prefill_len, 1)

    def prefill() -> None:
        rate = measure(bursts, prompts, params, clock)["prefill_tokens_per_s"]
        # One token of logits a prompt: the head is left out.
        head = size.model.vocab_size * size.model.hidden_size
        own = Decoder(size.model).num_params - head * (2 - size.model.tie_word_embeddings)
        share = 2 * own * rate / rates["product_flops_per_s"]
        figures.add("figures", prefill_tokens_per_s=rate, prefill_over_product_rate=share)

    for rows in size.rows[:2]:
        attempt(f"decode of {rows}", decode, rows)
    attempt("prefill", prefill)
    # One step a dispatch: of a loop that is a part of a CUDA graph, a trace has some turns only.
    single = Engine(size.model, weights, dataclasses.replace(config, decode_steps=1))

    def traced(name: str, work: Workload, start: str) -> dict[str, Any] | None:
        where, steps = str(directory / f"profile_{name}"), size.profile_steps
        profile = ProfileConfig(directory=where, steps=steps, start=start)
        if found := measure(single, work, params, clock, profile=profile)["profile"]:
            print(draw(found), flush=True)
        return found

    def profiled(rows: int) -> None:
        if found := traced(str(rows), workload(rows, size.prompt_len, size.output_len), "decode"):
            device = found["device"]
            of_rows = {f"device_{each}_{rows}": device[each] for each in ("busy_us", "idle_us")}
            of_rows |= {f"{each}_per_step_{rows}": device[each] for each in ("programs", "kernels")}
            figures.add("figures", **of_rows)

    for rows in size.rows[:2]:
        attempt(f"profile of {rows}", profiled, rows)
    attempt("profile of prefill", lambda: traced("prefill", prompts, "first"))
    for rows in size.rows[2:]:
        attempt(f"decode of {rows}", decode, rows)
        attempt(f"profile of {rows}", profiled, rows)
    return not errors


_OUTPUT_DIR = flags.DEFINE_string("output_dir", None, "Directory for the results.", required=True)
_BUDGET_S = flags.DEFINE_float("budget_s", 470, "Seconds that all parts may take.", 1)
_PARTS = flags.DEFINE_list("parts", list(PARTS), "What to measure, in this order.")
_PEER = flags.DEFINE_string("transformers_python", None, "An interpreter that has transformers.")
_SMOKE = flags.DEFINE_bool("smoke", False, "A small model, to see that all of it runs.")
_PART = flags.DEFINE_string("part", None, "How this program calls itself; not for you.")


def main(argv: list[str]) -> None:
    """Runs each part, and sums up."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if unknown := sorted(set(_PARTS.value) - set(PARTS)):
        raise app.UsageError(f"--parts={','.join(unknown)}: choose among {', '.join(PARTS)}")
    directory = pathlib.Path(_OUTPUT_DIR.value).absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        figures = Figures(directory / "figures.json")
        figures.add("figures")
    except OSError as e:
        raise app.UsageError(f"--output_dir={directory}: {e.strerror}") from e
    size = size_of(smoke=_SMOKE.value)
    if _PART.value is not None:
        require_device()
        sys.exit(0 if measure_steps(size, directory, figures) else 1)
    parts = [name for name in _PARTS.value if name != "transformers" or _PEER.value]
    start, end_s, whole = time.monotonic(), 0.0, sum(PARTS[name] for name in parts)
    passed = True
    for name in parts:
        end_s += _BUDGET_S.value * PARTS[name] / whole
        began = time.monotonic()
        status = _run_part(name, size, directory, figures, start + end_s)
        passed = passed and status == "passed"
        figures.add("parts", **{name: {"status": status, "seconds": time.monotonic() - began}})
    report = figures.read()
    for name, own in report["targets"].items():
        value = "missing" if own["value"] is None else f"{own['value']:.3f}"
        verdict = {None: "", True: "reached", False: "not reached"}[own["reached"]]
        print(f"{name:<32}{value:>12}   {own['target']:<8} {verdict}")
    print(json.dumps(report))
    sys.exit(0 if passed else 1)


def _run_part(
    name: str, size: Size, directory: pathlib.Path, figures: Figures, end_s: float
) -> str:
    """Runs a part until a time of `time.monotonic`, and takes what it found.

    Returns:
      passed, failed or timeout.
    """
    limit_s = end_s - time.monotonic()
    print(f"device_figures: {name}, {limit_s:.0f} s at most", file=sys.stderr)
    if name == "steps":
        command = [sys.executable, "-m", "jpaged.scripts.kernels.device_figures", "--part=steps"]
        command += [f"--output_dir={directory}", *(["--smoke"] if _SMOKE.value else [])]
        # What is kept of a run before this one would not be compiled.
        with tempfile.TemporaryDirectory() as programs:
            return _ended(command, limit_s, JAX_COMPILATION_CACHE_DIR=programs)
    if name == "kernels":
        return _run_kernels(size.kernels, "", directory, figures, end_s)
    if name == "narrow":
        found: list[str] = []
        for ending, given in size.narrow.items():
            # If it hangs, the next one has its time still.
            own_s = (end_s - time.monotonic()) / (len(size.narrow) - len(found))
            until_s, where = time.monotonic() + own_s, directory / f"kernels{ending}"
            found.append(_run_kernels(given, ending, where, figures, until_s))
        return next((status for status in found if status != "passed"), "passed")
    answers = directory / "transformers.jsonl"
    answers.unlink(missing_ok=True)
    status = _ended([*_peer_command(size, directory), str(answers)], limit_s)
    if answers.exists():
        lines = [json.loads(line) for line in answers.read_text(encoding="utf-8").splitlines()]
        figures.add("figures", **transformers_figures(lines, figures.read()["figures"]))
    return status


def _run_kernels(
    given: tuple[str, ...], ending: str, directory: pathlib.Path, figures: Figures, end_s: float
) -> str:
    """Runs `benchmark_kernels`; the names of its figures end so."""
    limit_s, kernels = end_s - time.monotonic(), directory / "kernels.json"
    kernels.unlink(missing_ok=True)
    # The case in progress when the budget is over is still to end.
    budget_s = max(limit_s - min(30, limit_s / 4), 1)
    command = [sys.executable, "-m", "jpaged.scripts.kernels.benchmark_kernels"]
    command += [f"--budget_s={budget_s:.0f}", f"--output_dir={directory}"]
    status = _ended([*command, *given], limit_s)
    if kernels.exists():
        found = kernel_figures(json.loads(kernels.read_text(encoding="utf-8")), ending)
        figures.add("figures", **found)
    return status


def _peer_command(size: Size, directory: pathlib.Path) -> list[str]:
    from jpaged.models.config_json import config_to_hf

    config = directory / "transformers_config.json"
    job = {
        "config": config_to_hf(size.model),
        "dtype": size.dtype,
        "rows": [rows for rows in size.rows if rows <= 64],
        "prompt_len": size.prompt_len,
        "output_len": size.output_len,
    }
    config.write_text(json.dumps(job), encoding="utf-8")
    script = pathlib.Path(__file__).with_name("transformers_steps.py")
    return [str(_PEER.value), str(script), str(config)]


def _ended(command: list[str], limit_s: float, **env: str) -> str:
    """Runs a program, with Ctrl-C when its time is over, so that it can still say what it has."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": sys.stderr}
    try:
        process = subprocess.Popen(command, cwd=_ROOT, env=os.environ | env, **streams)
    except OSError as e:
        print(f"device_figures: {command[0]}: {e.strerror}", file=sys.stderr)
        return "failed"
    try:
        return "failed" if process.wait(max(limit_s, 1)) else "passed"
    except subprocess.TimeoutExpired:
        return "timeout"
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


if __name__ == "__main__":
    run(main)
