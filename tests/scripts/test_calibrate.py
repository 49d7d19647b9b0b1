# SPDX-License-Identifier: Apache-2.0
"""The program that finds scales, as users run it."""

import jax.numpy as jnp
import numpy as np

from jpaged.device.kv_scales import calibrate, read_kv_scales
from jpaged.models import checkpoint
from jpaged.models.decoder import Decoder
from tests.models.test_decoder import FIXTURES, LLAMA
from tests.scripts.programs import run


def test_scales_of_a_file_of_prompts(tmp_path):
    prompts, scales = tmp_path / "prompts.txt", tmp_path / "scales.json"
    prompts.write_text("3 14 15 92 65\n35 89 79\n")
    command = [
        "jpaged", "calibrate", f"--model={FIXTURES / LLAMA}", f"--prompts_file={prompts}",
        f"--output={scales}",
    ]  # fmt: skip
    said = run(*command, "--kv_dtype=int8")
    assert said.startswith(
        f"wrote {scales}: int8 scales of 2 layers, found on 8 tokens of 2 prompts; keys "
    )
    config, params = checkpoint.load(FIXTURES / LLAMA, jnp.float32)
    want = calibrate(
        Decoder(config, backend="xla"), params, [[3, 14, 15, 92, 65], [35, 89, 79]], "int8",
        page_size=16, pool_dtype=np.dtype(np.float32),
    )  # fmt: skip
    np.testing.assert_allclose(read_kv_scales(scales, 2, "int8"), want, rtol=1e-5)
