# SPDX-License-Identifier: Apache-2.0
"""Loads a random model in every form, and reports the memory that each took: a started program.

    python -m tests.models.loaded DIRECTORY

The last line of its output is a JSON object: for each form, the most that the process had beside
what it had before, over the size of the parameters in float32.
"""

import gc
import json
import pathlib
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

from jpaged import Engine, EngineConfig
from jpaged.models import DEMO, checkpoint
from jpaged.models.config_json import config_to_hf, load_config
from jpaged.models.families import source_of
from jpaged.models.fitting import wanted_shapes

PACKED = pathlib.Path(__file__).parents[1] / "fixtures" / "hf" / "gpt_oss_mxfp4"
FIELDS = {
    "vocab_size": 8000,
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "intermediate_size": 1024,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "tie_word_embeddings": False,
}


def write(directory, dtype):
    """A directory of random weights."""
    directory.mkdir()
    fields = config_to_hf(load_config(DEMO)) | FIELDS
    (directory / "config.json").write_text(json.dumps(fields))
    config, rng = load_config(directory), np.random.default_rng(0)
    tensors = {}
    for path, shape in wanted_shapes(config, {}).items():
        numbers = rng.standard_normal(shape, np.float32).astype(dtype)
        tensors[source_of(path, shape, config).names[0]] = numbers
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def write_packed(directory):
    """A directory of random experts as gpt-oss has them: packed weights of 4 bits in MXFP4."""
    directory.mkdir()
    fields = json.loads((PACKED / "config.json").read_text())
    changed = {"hidden_size": 384, "intermediate_size": 384, "num_local_experts": 4}
    changed |= {"max_position_embeddings": 256, "num_hidden_layers": 12}
    changed["layer_types"] = fields["layer_types"] * 6
    (directory / "config.json").write_text(json.dumps(fields | changed))
    sizes, rng = {64: 384, 96: 384, 192: 768, 3: 4}, np.random.default_rng(0)
    tensors = {}
    with safetensors.safe_open(PACKED / "model.safetensors", "numpy") as file:
        for name in file.keys():
            small = file.get_tensor(name)
            shape = [sizes.get(size, size) for size in small.shape]
            if name.endswith(("_blocks", "_scales")):
                shape[2] = 384 // 32
            for layer in range(12):
                if f"layers.{layer % 2}." in name or layer == 0:
                    numbers = rng.integers(120, 128, shape).astype(small.dtype)
                    tensors[name.replace(f"layers.{layer % 2}.", f"layers.{layer}.")] = numbers
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")


def memory(field):
    """Bytes, as the kernel counts them: VmRSS has, VmHWM had at most."""
    (line,) = [x for x in open("/proc/self/status") if x.startswith(field)]
    return int(line.split()[1]) * 1024


def growth(load, kept):
    """What loading took, over the size of what was loaded, which stays where it is."""
    gc.collect()
    before = memory("VmRSS")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forgets what was had at most
    params = load()
    kept.append(jax.block_until_ready(params))
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return (memory("VmHWM") - before) / size


def engine(directory, scan_layers):
    config = EngineConfig(
        dtype="float32", scan_layers=scan_layers, num_pages=17, max_model_len=256, swap_bytes=0
    )
    made = Engine.load(directory, config)
    return made._runner.params


def main():
    root = pathlib.Path(sys.argv[1])
    half, full, orbax, packed = (root / name for name in ("half", "full", "orbax", "packed"))
    write_packed(packed)
    write(half, ml_dtypes.bfloat16)
    write(full, np.float32)
    checkpoint.save_orbax(orbax, *checkpoint.load(half, jnp.bfloat16))
    # What is imported and compiled once.
    kept = [engine(half, True), checkpoint.load(orbax, jnp.float32)[1], engine(packed, False)]
    forms = {
        "safetensors, bfloat16": lambda: checkpoint.load(half, jnp.float32)[1],
        "safetensors, float32": lambda: checkpoint.load(full, jnp.float32)[1],
        "safetensors, engine": lambda: engine(half, False),
        "safetensors, engine that scans": lambda: engine(half, True),
        "MXFP4, engine": lambda: engine(packed, False),
        "orbax": lambda: checkpoint.load(orbax, jnp.float32)[1],
        "orbax, engine that scans": lambda: engine(orbax, True),
    }
    print(json.dumps({name: growth(load, kept) for name, load in forms.items()}))


if __name__ == "__main__":
    main()
