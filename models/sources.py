# SPDX-License-Identifier: Apache-2.0
"""What a model's path is, a directory or a GGUF file: decided here, once."""

import pathlib

from jpaged.models.config import ModelConfig
from jpaged.models.config_json import load_config
from jpaged.models.gguf_file import GgufFile, is_gguf
from jpaged.models.gguf_model import config_of

Source = pathlib.Path | GgufFile
"""A model's directory, or its GGUF file with the header read."""


def opened(path: Source) -> Source:
    """The path, or the GGUF file that it is, its header read: once for all that look at it.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if it is damaged.
    """
    return GgufFile(path) if not isinstance(path, GgufFile) and is_gguf(path) else path


def read_config(source: Source) -> ModelConfig:
    """The model's shape; of weights nothing is looked at.

    Raises:
      FileNotFoundError: if there is no config.json.
      ValueError: if it is none of a model that is supported.
    """
    return config_of(source) if isinstance(source, GgufFile) else load_config(source)
