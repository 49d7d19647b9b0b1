#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Checks and measures jpaged on a machine with a GPU, in less than ten minutes.
#
#     scripts/device_check.sh [PART...]
#     scripts/device_check.sh figures         # in 8 minutes, all that a release is held to
#
# Parts, without any all but the last, and in this order: conformance_bfloat16, tests, kernels,
# engine, conformance_float32, figures (scripts/kernels/device_figures.py: the step at 64, 1 and 256
# rows beside its floor, attention and prefill beside others, and attention that is not in use yet).
# Nothing is written elsewhere than to $OUT, or where that is not set to device_check_results/DATE
# in the repository: summary.json (each part's status, seconds and key figures), environment.json
# (always), tests.xml, conformance_bfloat16.json, conformance_float32.json, kernels.json,
# engine.json, figures.json, with it traces in profile_ROWS and kernels_* of other kernels, and
# log.txt.
#
# PYTHON (python3) runs it. DEVICE_CHECK_S (570, of figures alone 480) is how many seconds all parts
# may take: each has a share of them, and what one leaves the next may use. TRANSFORMERS_PYTHON is an
# interpreter that has torch and transformers, for figures; without it those of transformers are
# missing. A part that fails does not keep the next from
# running. The exit code is 0 if all passed, 1 if one did not, and 2 where nothing could be run: jax
# sees no GPU, or the usage is wrong. Without some of jpaged's dependencies, the parts that need
# them are skipped, which counts as not passed.
set -uo pipefail

readonly ALL_PARTS="conformance_bfloat16 tests kernels engine conformance_float32"
PYTHON="${PYTHON:-python3}"
TOTAL_S="${DEVICE_CHECK_S:-$([[ "$*" == figures ]] && echo 480 || echo 570)}"
# tests/conftest.py, for one, would else choose the CPU.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cuda,cpu}"

stop() {
  echo "device_check: $*" >&2
  exit 2
}

# Seconds of the whole that a part may take, of 570.
share_s() {
  case "$1" in
    tests) echo 120 ;;
    conformance_*) echo 70 ;;
    kernels) echo 130 ;;
    engine) echo 180 ;;
    figures) echo 480 ;;
  esac
}

# Modules that a part imports, beside jax and numpy.
modules() {
  case "$1" in
    tests) echo "absl hypothesis pytest" ;;
    conformance_* | kernels) echo "absl" ;;
    engine | figures) echo "absl flax orbax.checkpoint psutil safetensors tokenizers tqdm" ;;
  esac
}

# Prints those of its arguments that cannot be found.
missing() {
  "$PYTHON" - "$@" <<'EOF'
import importlib.util
import sys

for name in sys.argv[1:]:
    try:
        found = importlib.util.find_spec(name)
    except ImportError:
        found = None
    if found is None:
        print(name)
EOF
}

start_s="$(date +%s)"
cd "$(dirname "${BASH_SOURCE[0]}")/.." || stop "cannot enter the repository"
parts="${*:-$ALL_PARTS}"
for part in $parts; do
  case " $ALL_PARTS figures " in
    *" $part "*) ;;
    *) stop "no part is called $part; choose among $ALL_PARTS figures" ;;
  esac
done
case "$TOTAL_S" in
  '' | *[!0-9]*) stop "DEVICE_CHECK_S=$TOTAL_S is no number of seconds" ;;
esac
command -v timeout >/dev/null || stop "needs the command timeout, of GNU coreutils"
command -v "$PYTHON" >/dev/null || stop "there is no $PYTHON; name a Python as PYTHON=PATH"
export PYTHONDONTWRITEBYTECODE=1
# jpaged need not be installed, wherever a program of a test is started.
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
saw="$(
  timeout 120 "$PYTHON" -c '
import jax

device = jax.devices()[0]
assert device.platform == "gpu", f"its default device is {device.device_kind!r}"
' 2>&1
)" || stop "jax sees no GPU (JAX_PLATFORMS=$JAX_PLATFORMS): $(tail -n 1 <<<"$saw")"

out="${OUT:-device_check_results/$(date +%Y%m%d-%H%M%S)}"
mkdir -p "$out" || stop "cannot make the folder $out"
out="$(cd "$out" && pwd)" || stop "cannot enter the folder $out"
work="$(mktemp -d "$out/.work.XXXXXX")" || stop "cannot write to $out"
trap 'rm -rf "$work"' EXIT
mkdir "$work/tmp" "$work/home"
# What the programs and the driver keep goes into the folder that is removed.
export TMPDIR="$work/tmp" XDG_CACHE_HOME="$work/home" CUDA_CACHE_PATH="$work/home/cuda"
export TRITON_CACHE_DIR="$work/home/triton" HYPOTHESIS_STORAGE_DIRECTORY="$work/home/hypothesis"
log="$out/log.txt"
: >"$log"
: >"$work/results"

# The last line of a file, if it is JSON, to another file.
keep_json() {
  tail -n 1 "$1" | "$PYTHON" -c '
import json, sys

print(json.dumps(json.loads(sys.stdin.read())))
' >"$work/last.json" 2>>"$log" && mv "$work/last.json" "$2"
}

# Runs the rest of its arguments until the part's time is over: output to a file and the log.
limited() {
  local to="$1" left code
  shift
  left=$((end_s - $(date +%s)))
  if ((left < 1)); then
    return 124
  fi
  echo "+ $*" >>"$log"
  # Ctrl-C's signal first, so that a program can still print what it has.
  timeout --signal=INT --kill-after=5 "$left" "$@" >"$to" 2>>"$log"
  code=$?
  cat "$to" >>"$log"
  return "$code"
}

run_tests() {
  local where=tests
  # pytest imports all that it might select from.
  # shellcheck disable=SC2046  # words on purpose
  [[ -z "$(missing $(modules engine))" ]] || where=tests/pallas_kernels
  # Some tests start processes of their own, which need memory beside it.
  limited "$work/tests.txt" env XLA_PYTHON_CLIENT_PREALLOCATE=false \
    "$PYTHON" -m pytest "$where" -m gpu -q -p no:cacheprovider \
    --basetemp="$work/pytest" --junit-xml="$out/tests.xml"
}

run_conformance() {
  local code
  limited "$work/$1.txt" "$PYTHON" -m jpaged conformance --backend=gpu --dtype="$2"
  code=$?
  keep_json "$work/$1.txt" "$out/$1.json" || return $((code ? code : 1))
  return "$code"
}

run_kernels() {
  # The case in progress when the budget is over is still to end.
  local budget_s=$((end_s - $(date +%s) - 40))
  limited "$work/kernels.txt" "$PYTHON" -m scripts.kernels.benchmark_kernels \
    --budget_s="$((budget_s > 20 ? budget_s : 20))" --output_dir="$out"
}

generate() {
  local to="$1"
  shift
  limited "$work/$to" "$PYTHON" -m jpaged generate --output=json --temperature=0 --max_tokens=48 \
    --prompt="Once upon a time" --prompt="The old fisherman" --compilation_cache_dir= "$@"
}

# Each figure on its own: what fails leaves the others.
run_engine() {
  local code=0
  generate default.json || code=$?
  # float32 throughout, so that greedy choices depend on no rounding of either backend.
  export JAX_DEFAULT_MATMUL_PRECISION=highest
  generate gpu.json --dtype=float32 --backend=gpu || code=$?
  generate xla.json --dtype=float32 --backend=xla || code=$?
  unset JAX_DEFAULT_MATMUL_PRECISION
  limited "$work/host.json" "$PYTHON" -m scripts.measure.benchmark_host || code=$?
  limited "$work/benchmark.json" "$PYTHON" -m jpaged benchmark --random_weights=llama-3.2-1b \
    --dtype=bfloat16 --num_requests=64 --prompt_len=256 --output_len=64 --max_model_len=1024 \
    --compilation_cache_dir= || code=$?
  limited "$out/engine.json" "$PYTHON" - "$work" <<'EOF' || code=$?
import json
import pathlib
import sys

work = pathlib.Path(sys.argv[1])


def lines(name):
    path = work / name
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def last(name):
    try:
        return json.loads(lines(name)[-1])
    except (IndexError, ValueError):
        return None


def generated(name):
    try:
        return [json.loads(line)["outputs"][0] for line in lines(name)]
    except (IndexError, KeyError, ValueError):
        return []


text = [output["text"] for output in generated("default.json")]
gpu = [output["token_ids"] for output in generated("gpu.json")]
xla = [output["token_ids"] for output in generated("xla.json")]
report = {
    "text": text,
    "gives_text": len(text) == 2 and all(len(each.split()) > 5 for each in text),
    "gpu_token_ids": gpu,
    "xla_token_ids": xla,
    "greedy_equals_xla": len(gpu) == 2 and gpu == xla,
    "benchmark": last("benchmark.json"),
    "host": last("host.json"),
}
print(json.dumps(report))
sys.exit(not (report["gives_text"] and report["greedy_equals_xla"] and report["benchmark"]))
EOF
  return "$code"
}

run_figures() {
  # What it has when its time is over it has written; the rest is to stop its own programs.
  local budget_s=$((end_s - $(date +%s) - 10)) peer=()
  [[ -z "${TRANSFORMERS_PYTHON:-}" ]] || peer=(--transformers_python="$TRANSFORMERS_PYTHON")
  limited "$work/figures.txt" "$PYTHON" -m scripts.kernels.device_figures \
    --budget_s="$((budget_s > 20 ? budget_s : 20))" --output_dir="$out" ${peer[@]+"${peer[@]}"}
}

run_part() {
  case "$1" in
    tests) run_tests ;;
    conformance_*) run_conformance "$1" "${1#conformance_}" ;;
    kernels) run_kernels ;;
    engine) run_engine ;;
    figures) run_figures ;;
  esac
}

status=passed
timeout 60 "$PYTHON" - >"$out/environment.json" 2>>"$log" <<'EOF' || status=failed
import json
import platform
import subprocess
from importlib import metadata

import jax

device = jax.devices()[0]
wanted = ("Driver Version", "CUDA Version", "Product Name", "Performance State", "VBIOS Version")
wanted += ("Graphics :", "SM :", "Memory :", "Total :", "Current Power Limit", "GPU Current Temp")


def nvidia_smi():
    try:
        done = subprocess.run(["nvidia-smi", "-q"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as e:
        return [str(e)]
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    return [line for line in lines if line.startswith(wanted)]


versions = {}
for dist in metadata.distributions():
    name = dist.metadata["Name"] or ""
    if name.lower().startswith(("jax", "nvidia-", "flax", "numpy", "orbax", "torch", "triton")):
        versions[name] = dist.version
facts = {
    "python": platform.python_version(),
    "platform": platform.platform(),
    "device": device.device_kind,
    "num_devices": len(jax.devices()),
    "compute_capability": getattr(device, "compute_capability", None),
    "memory_bytes": (device.memory_stats() or {}).get("bytes_limit"),
    "versions": dict(sorted(versions.items())),
    "nvidia_smi": nvidia_smi(),
}
print(json.dumps(facts, indent=1))
EOF

printf 'environment\t%s\t%s\t\n' "$status" "$(($(date +%s) - start_s))" >>"$work/results"

# A first look, so that nobody waits for parts that cannot run.
# shellcheck disable=SC2046  # words on purpose
absent="$(missing $(for part in $parts; do modules "$part"; done | tr ' ' '\n' | sort -u))"
if [[ -n "$absent" ]]; then
  echo "device_check: not installed, so that parts are skipped: ${absent//$'\n'/ }"
fi

# Parts' shares are of all that run; what is left over of one goes to those after it.
all_s=0
for part in $parts; do
  all_s=$((all_s + $(share_s "$part")))
done
end_s="$start_s"
for part in $parts; do
  end_s=$((end_s + TOTAL_S * $(share_s "$part") / all_s))
  part_start_s="$(date +%s)"
  # shellcheck disable=SC2046  # words on purpose
  absent="$(missing $(modules "$part"))"
  if [[ -n "$absent" ]]; then
    status=skipped detail="not installed: ${absent//$'\n'/ }"
  else
    echo "device_check: $part, until $((end_s - start_s)) s" >&2
    run_part "$part"
    code=$?
    detail="exit code $code"
    case "$code" in
      0) status=passed ;;
      124 | 137) status=timeout ;;
      *) status=failed ;;
    esac
  fi
  printf '%s\t%s\t%s\t%s\n' "$part" "$status" "$(($(date +%s) - part_start_s))" "$detail" \
    >>"$work/results"
done

# Nothing that is written is as large as this; a program gone wild could be.
if (($(wc -c <"$log") > 8000000)); then
  tail -c 8000000 "$log" >"$work/log" && mv "$work/log" "$log"
fi

"$PYTHON" - "$out" "$work/results" <<'EOF'
import json
import pathlib
import sys
from xml.etree import ElementTree

out = pathlib.Path(sys.argv[1])


def load(name):
    try:
        return json.loads((out / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def figures(part):
    if part == "tests":
        try:
            suite = ElementTree.parse(out / "tests.xml").getroot().find("testsuite")
            return {k: int(suite.get(k)) for k in ("tests", "failures", "errors", "skipped")}
        except (OSError, ElementTree.ParseError, AttributeError, TypeError):
            return {}
    report = load(f"{part}.json")
    if part.startswith("conformance"):
        return {k: report[k] for k in ("passed", "failed", "refused") if k in report}
    if part == "kernels" and report:
        ratios = [
            entry["copy_ratio"]
            for result in report["results"]
            for name, entry in result["contenders"].items()
            if name in report["config"]["backends"] and entry["status"] == "ok"
            if not result["cached"]
        ]
        return {
            "cases": len(report["results"]),
            "left_out": len(report["left_out"]),
            "copy_gb_per_s": round(report["copy_bytes_per_s"] / 1e9, 1),
            "best_copy_ratio": round(max(ratios), 3) if ratios else None,
            **{f"speedup {pair}": round(mean, 2) for pair, mean in report["summary"].items()},
        }
    if part == "figures" and report:
        return {
            name: f"{own['value']} ({own['target']}, reached: {own['reached']})"
            for name, own in report["targets"].items()
        }
    if part == "engine" and report:
        found = {key: report[key] for key in ("gives_text", "greedy_equals_xla")}
        for run in ((report["benchmark"] or {}).get("runs") or {}).values():
            for key in ("output_tokens_per_s", "decode_tokens_per_s", "mean_decode_step_s"):
                found[key] = run.get(key)
        found["host_us_per_step"] = (report["host"] or {}).get("total_us")
        return found
    return {}


parts = []
for line in pathlib.Path(sys.argv[2]).read_text(encoding="utf-8").splitlines():
    name, status, seconds, detail = line.split("\t")
    found = figures(name)
    if name == "tests" and status == "passed":
        # Skipped tests show nothing, and pytest is content with them.
        ran = found.get("tests", 0) - found.get("skipped", 0)
        if ran < 1:
            status, detail = "failed", "no test ran"
    elif name.startswith("conformance") and status == "passed" and not found.get("passed"):
        status, detail = "failed", "no case passed"
    part = {"part": name, "status": status, "seconds": int(seconds), "detail": detail}
    parts.append({**part, "figures": found})
passed = all(part["status"] == "passed" for part in parts)
environment = load("environment.json")
device = environment.get("device")
summary = {"passed": passed, "device": device, "parts": parts}
(out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")

print(f"\n{device}, jax {environment.get('versions', {}).get('jax')}; results in {out}\n")
for part in parts:
    print(f"{part['part']:<22} {part['status']:<8} {part['seconds']:>4} s  {part['detail']}")
    for key, value in part["figures"].items():
        print(f"{'':<24}{key}: {value}")
sys.exit(0 if passed else 1)
EOF
