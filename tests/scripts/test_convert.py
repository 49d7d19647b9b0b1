# SPDX-License-Identifier: Apache-2.0
"""The program that converts, as users run it."""

import jax
import jax.numpy as jnp
import numpy as np

from jpaged.models import DEMO, checkpoint
from jpaged.models.convert import convert
from tests.scripts.programs import run


def test_a_model_is_converted(tmp_path):
    new = tmp_path / "new"
    convert(DEMO, new)
    said = run(
        "jpaged", "convert", "--model=demo", f"--output={new}", "--format=orbax",
        "--dtype=float32", "--overwrite",
    )  # fmt: skip
    assert said == f"wrote {new}: 2.8 M parameters as float32, 11.0 MB\n"
    want, got = checkpoint.load(DEMO, jnp.float32)[1], checkpoint.load(new, jnp.float32)[1]
    jax.tree.map(np.testing.assert_array_equal, got, want)
    files = sorted(path.name for path in new.iterdir())
    assert files == ["config.json", "params", "tokenizer.json"]
