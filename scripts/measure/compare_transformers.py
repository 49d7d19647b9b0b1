# SPDX-License-Identifier: Apache-2.0
"""Compares the speed of jpaged with that of Hugging Face transformers' `generate`.

    python -m scripts.measure.compare_transformers --peer_python=PATH

PATH is the interpreter of an environment with `torch`, `transformers`, `absl-py` and `numpy`, which
are no dependencies of jpaged. Nothing is downloaded: random weights of a public model's shape are
written to a temporary directory in Hugging Face's format, and both engines load them from there, in
float32, and continue the same random prompts greedily as one batch. transformers runs first, in a
process of its own that has ended when jpaged starts.

The last line of standard output is one JSON object: `shape`, `num_requests`, `prompt_len`,
`output_len`, `threads`, `versions`, `compilation_cache` (whether jpaged may have found its programs
compiled by an earlier run; --compilation_cache_dir= avoids it); for each of `jpaged` and
`transformers`

  * `load_s`: from the weights on disk to an engine in memory;
  * `cold_s`, `warm_s`: the first batch, and the median of `--repeats` later ones;
  * `cold_tokens_per_s`, `warm_tokens_per_s`: generated tokens over these;
  * `first_token_s`: a warm batch that generates a single token a request (prefill);
  * `decode_step_s`: (`warm_s` - `first_token_s`) / (`output_len` - 1);

then `ratio` (jpaged / transformers) of `cold_tokens_per_s`, `warm_tokens_per_s`, `prefill` and
`decode` speed; and `agreement`: `requests`, the share of requests whose tokens are all the same,
and `tokens`, the share of tokens before a request's first difference. Random weights make near
ties, which rounding decides, so a difference is not yet a fault.
"""

import json
import os
import pathlib
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from jpaged.models.shapes import SHAPES
from jpaged.scripts.flags import (
    define_engine_flags,
    enable_compilation_cache,
    engine_config_from_flags,
    require_device,
    run,
)
from jpaged.simulation.lengths import Uniform
from jpaged.simulation.workload import make_workload

_PEER_PYTHON = flags.DEFINE_string("peer_python", None, "Interpreter that has transformers.")
_SHAPE = flags.DEFINE_enum("shape", "smollm2-135m", sorted(SHAPES), "Shape of the model.")
_NUM_REQUESTS = flags.DEFINE_integer("num_requests", 16, "Requests in a batch.", lower_bound=1)
_PROMPT_LEN = flags.DEFINE_integer("prompt_len", 64, "Tokens of each prompt.", lower_bound=1)
_OUTPUT_LEN = flags.DEFINE_integer("output_len", 64, "Tokens to generate.", lower_bound=2)
_REPEATS = flags.DEFINE_integer("repeats", 3, "Warm batches; the median counts.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of weights and prompts.", lower_bound=0)
_THREADS = flags.DEFINE_integer("threads", None, "Of torch; all cores by default.", lower_bound=1)
_PEER_JOB = flags.DEFINE_string("peer_job", None, "How this script calls itself; not for you.")
define_engine_flags()

Tokens = list[list[int]]


def main(argv: list[str]) -> None:
    """Measures both and reports."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    if _PEER_JOB.value is not None:
        _transformers_main(pathlib.Path(_PEER_JOB.value))
        return
    if _PEER_PYTHON.value is None:
        raise app.UsageError("--peer_python=PATH must name an interpreter that has transformers")
    if engine_config_from_flags().dtype not in (None, "float32"):
        raise app.UsageError("both engines are compared in float32: leave --dtype alone")
    from jpaged.measure import machine  # not above: the peer has no jax

    prompts = [item.prompt_token_ids for item in _workload()]
    with tempfile.TemporaryDirectory() as name:
        directory = pathlib.Path(name)
        _write_model(directory)
        theirs, their_tokens, versions = _run_transformers(directory, prompts)
        ours, our_tokens = _run_jpaged(directory, prompts)
    report = {
        "shape": _SHAPE.value,
        "num_requests": _NUM_REQUESTS.value,
        "prompt_len": _PROMPT_LEN.value,
        "output_len": _OUTPUT_LEN.value,
        "threads": _num_threads(),
        "compilation_cache": bool(flags.FLAGS.compilation_cache_dir),
        "versions": versions | machine.versions(),
        "jpaged": ours,
        "transformers": theirs,
        "ratio": {
            "cold_tokens_per_s": theirs["cold_s"] / ours["cold_s"],
            "warm_tokens_per_s": theirs["warm_s"] / ours["warm_s"],
            "prefill": theirs["first_token_s"] / ours["first_token_s"],
            "decode": theirs["decode_step_s"] / ours["decode_step_s"],
        },
        "agreement": _agreement(our_tokens, their_tokens),
    }
    _print_report(report)
    print(json.dumps(report))


def _workload():
    length = Uniform(_PROMPT_LEN.value, _PROMPT_LEN.value)
    total = _PROMPT_LEN.value + _OUTPUT_LEN.value
    config = SHAPES[_SHAPE.value]
    try:
        return make_workload(
            _NUM_REQUESTS.value,
            length,
            Uniform(_OUTPUT_LEN.value, _OUTPUT_LEN.value),
            max_model_len=min(config.max_position_embeddings, total),
            vocab_size=config.vocab_size,
            seed=_SEED.value,
        ).items
    except ValueError as e:
        raise app.UsageError(str(e)) from e


def _write_model(directory: pathlib.Path) -> None:
    """Writes config.json and model.safetensors as Hugging Face would."""
    import jax
    import jax.numpy as jnp
    import safetensors.numpy

    from jpaged.models.config_json import config_to_hf
    from jpaged.models.decoder import Decoder
    from jpaged.models.families import source_of

    config = SHAPES[_SHAPE.value]
    params = Decoder(config).init(jax.random.key(_SEED.value), jnp.float32)
    tensors = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name = "/".join(key.key for key in path)
        tensors[source_of(name, leaf.shape, config).names[0]] = np.asarray(leaf)
    # transformers refuses a file that does not say which framework wrote it.
    safetensors.numpy.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))


def _run_jpaged(directory: pathlib.Path, prompts: Tokens) -> tuple[dict[str, Any], Tokens]:
    import dataclasses

    from jpaged.engine import Engine
    from jpaged.host.params import SamplingParams

    enable_compilation_cache()
    require_device()
    config = engine_config_from_flags()
    total = _PROMPT_LEN.value + _OUTPUT_LEN.value
    config = dataclasses.replace(
        config, dtype="float32", max_model_len=config.max_model_len or total
    )
    start = time.perf_counter()
    try:
        engine = Engine.load(directory, config)
    except ValueError as e:
        raise app.UsageError(str(e)) from e
    load_s = time.perf_counter() - start

    def generate(num_tokens: int) -> Tokens:
        params = SamplingParams(max_tokens=num_tokens, temperature=0.0, ignore_eos=True)
        return [output.outputs[0].token_ids for output in engine.generate(prompts, params)]

    times, tokens = _time_batches(generate)
    return {"load_s": load_s, **times}, tokens


def _run_transformers(
    directory: pathlib.Path, prompts: Tokens
) -> tuple[dict[str, Any], Tokens, dict[str, str]]:
    """Runs this file with the peer's interpreter."""
    job, result = directory / "job.json", directory / "result.json"
    job.write_text(json.dumps({"prompts": prompts, "threads": _num_threads()}))
    command = [
        str(_PEER_PYTHON.value),
        "-m",
        "jpaged.scripts.measure.compare_transformers",
        f"--peer_job={job}",
        f"--output_len={_OUTPUT_LEN.value}",
        f"--num_requests={_NUM_REQUESTS.value}",
        f"--repeats={_REPEATS.value}",
    ]
    try:
        subprocess.run(command, cwd=pathlib.Path(__file__).resolve().parents[2], check=True)
    except OSError as e:
        raise app.UsageError(f"--peer_python={_PEER_PYTHON.value}: {e.strerror}") from e
    except subprocess.CalledProcessError as e:
        raise app.UsageError(
            f"--peer_python={_PEER_PYTHON.value} failed with exit code {e.returncode}, see above"
        ) from e
    answer = json.loads(result.read_text())
    return answer["times"], answer["tokens"], answer["versions"]


def _transformers_main(job_path: pathlib.Path) -> None:
    """The peer's half: loads the model beside the job and writes times and tokens beside it."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    job = json.loads(job_path.read_text())
    torch.set_num_threads(job["threads"])
    start = time.perf_counter()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        job_path.parent, dtype=torch.float32, local_files_only=True
    ).eval()
    load_s = time.perf_counter() - start
    prompts = torch.tensor(job["prompts"])

    def generate(num_tokens: int) -> Tokens:
        with torch.inference_mode():
            out = model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=num_tokens,
                max_new_tokens=num_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[:, prompts.shape[1] :].tolist()

    times, tokens = _time_batches(generate)
    answer = {
        "times": {"load_s": load_s, **times},
        "tokens": tokens,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    (job_path.parent / "result.json").write_text(json.dumps(answer))


def _time_batches(generate: Callable[[int], Tokens]) -> tuple[dict[str, float], Tokens]:
    """Times one engine: a cold batch, warm ones, and warm ones of a single token each."""

    def timed(num_tokens: int) -> tuple[float, Tokens]:
        start = time.perf_counter()
        tokens = generate(num_tokens)
        return time.perf_counter() - start, tokens

    output_len, repeats = _OUTPUT_LEN.value, _REPEATS.value
    cold_s, tokens = timed(output_len)
    warm_s = statistics.median(timed(output_len)[0] for _ in range(repeats))
    timed(1)
    first_token_s = statistics.median(timed(1)[0] for _ in range(repeats))
    count = _NUM_REQUESTS.value * output_len
    times = {
        "cold_s": cold_s,
        "warm_s": warm_s,
        "cold_tokens_per_s": count / cold_s,
        "warm_tokens_per_s": count / warm_s,
        "first_token_s": first_token_s,
        "decode_step_s": (warm_s - first_token_s) / (output_len - 1),
    }
    return times, tokens


def _agreement(ours: Tokens, theirs: Tokens) -> dict[str, float]:
    """Shares of requests, and of tokens before a first difference, that agree."""
    same = []
    for own, other in zip(ours, theirs, strict=True):
        equal = np.array(own) == np.array(other)
        same.append(len(own) if equal.all() else int(equal.argmin()))
    return {
        "requests": float(np.mean([count == _OUTPUT_LEN.value for count in same])),
        "tokens": float(np.mean(same)) / _OUTPUT_LEN.value,
    }


def _num_threads() -> int:
    return _THREADS.value or os.cpu_count() or 1


def _print_report(report: dict[str, Any]) -> None:
    print(
        f"{report['shape']} with random weights in float32, {report['num_requests']} requests of "
        f"{report['prompt_len']} + {report['output_len']} tokens, {report['threads']} threads"
    )
    print(", ".join(f"{name} {version}" for name, version in report["versions"].items()))
    print(f"{'':<24}{'jpaged':>14}{'transformers':>14}{'speed ratio':>14}")
    ratio = report["ratio"]
    for label, key, unit, compared in (
        ("load", "load_s", "s", None),
        ("first batch (cold)", "cold_s", "s", "cold_tokens_per_s"),
        ("later batch (warm)", "warm_s", "s", "warm_tokens_per_s"),
        ("  tokens/s", "warm_tokens_per_s", "", "warm_tokens_per_s"),
        ("  prefill", "first_token_s", "s", "prefill"),
        ("  decode step", "decode_step_s", "ms", "decode"),
    ):
        cells = [report[engine][key] for engine in ("jpaged", "transformers")]
        if unit == "ms":
            cells = [1e3 * cell for cell in cells]
        shown = "".join(f"{f'{cell:.2f} {unit}'.strip():>14}" for cell in cells)
        print(f"{label:<24}{shown}" + (f"{ratio[compared]:>14.2f}" if compared else ""))
    agreement = report["agreement"]
    print(
        f"same tokens: {agreement['requests']:.1%} of the requests, {agreement['tokens']:.1%} of "
        "the tokens before a first difference"
    )


if __name__ == "__main__":
    run(main)
