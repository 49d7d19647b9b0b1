# SPDX-License-Identifier: Apache-2.0
"""Converts a model between safetensors and Orbax, and to another dtype.

    jpaged convert --model=DIR --output=NEW --format=orbax
    jpaged convert --model=org/name --output=NEW --dtype=bfloat16

NEW is a model directory that loads to the same parameters, with the model's tokenizer, chat
templates and generation_config.json. Safetensors have Hugging Face's names, in files of 2 GB at
most, for other programs too; MXFP4 becomes the bfloat16 that it stands for. Memory holds one such
file at a time. NEW is there when it is whole: what is cut short leaves nothing of that name.
"""

import jax
import jax.numpy as jnp
from absl import app, flags

from jpaged.models.convert import FORMS, convert
from jpaged.models.stored_tensor import WEIGHT_DTYPES
from jpaged.scripts.flags import model_path, require_device, run, usage_errors

_MODEL = flags.DEFINE_string(
    "model",
    None,
    "Model directory, Hugging Face's or our own, or a model's name on the Hugging Face hub, "
    "org/name; demo is the shipped checkpoint.",
)
_OUTPUT = flags.DEFINE_string("output", None, "Directory to write.")
_FORMAT = flags.DEFINE_enum("format", FORMS[0], FORMS, "Of the weights.")
_DTYPE = flags.DEFINE_enum(
    "dtype",
    None,
    WEIGHT_DTYPES,
    "Of every parameter; without it they keep theirs.",
)
_OVERWRITE = flags.DEFINE_bool(
    "overwrite", False, "Replace a model directory that is there under --output's name."
)


def main(argv: list[str]) -> None:
    """Converts, and says what was written."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    for flag in (_MODEL, _OUTPUT):
        if not flag.value:
            raise app.UsageError(f"--{flag.name} must be given")
    assert _MODEL.value is not None and _OUTPUT.value is not None
    # Arrays are the host's throughout; where there is a device, it stays to whoever uses it.
    jax.config.update("jax_platforms", "cpu")
    require_device()
    with usage_errors():
        written = convert(
            model_path(_MODEL.value),
            _OUTPUT.value,
            form=_FORMAT.value,
            dtype=None if _DTYPE.value is None else jnp.dtype(_DTYPE.value),
            overwrite=_OVERWRITE.value,
        )
    print(
        f"wrote {_OUTPUT.value}: {written.num_params / 1e6:.1f} M parameters as "
        f"{', '.join(sorted(written.dtypes))}, {written.num_bytes / 1e6:.1f} MB"
    )


if __name__ == "__main__":
    run(main)
