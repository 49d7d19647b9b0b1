# SPDX-License-Identifier: Apache-2.0
"""Model families, one file a family: how config.json is read, and where the weights are stored."""

from collections.abc import Mapping
from types import MappingProxyType

from jpaged.models.config import ModelConfig
from jpaged.models.families import gemma, gpt_oss, llama, mistral, olmo2, phi3, qwen, smollm3
from jpaged.models.families.base import Family, Source

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        family.architecture: family
        for family in (
            llama.FAMILY,
            smollm3.FAMILY,
            mistral.MISTRAL,
            mistral.MINISTRAL,
            mistral.MIXTRAL,
            qwen.QWEN2,
            qwen.QWEN3,
            qwen.QWEN3_MOE,
            phi3.FAMILY,
            olmo2.FAMILY,
            gemma.GEMMA2,
            gemma.GEMMA3,
            gpt_oss.FAMILY,
        )
    }
)


def source_of(path: str, shape: tuple[int, ...], config: ModelConfig) -> Source:
    """Where a checkpoint of Hugging Face's has a parameter.

    Args:
      path: of the parameter, such as `layers_3/mlp/up_proj/weight`.
      shape: likewise.
      config: the model's.
    """
    return FAMILIES[config.family].source(path, shape, config)
