# SPDX-License-Identifier: Apache-2.0
"""Model families, one file a family: how config.json is read, and where the weights are stored."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from jpaged.models.config import ModelConfig
from jpaged.models.families import gemma, gpt_oss, llama, mistral, olmo2, phi3, qwen, smollm3
from jpaged.models.families.base import Family, Source, TextPart

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

TEXT_PARTS: Sequence[TextPart] = (gemma.GEMMA3_TEXT,)


def text_part(fields: Mapping[str, Any]) -> TextPart | None:
    """What a config.json has beside a part that sees images; None if it is of text alone."""
    return next((part for part in TEXT_PARTS if part.is_of(fields)), None)


def source_of(path: str, shape: tuple[int, ...], config: ModelConfig) -> Source:
    """Where a checkpoint of Hugging Face's has a parameter.

    Args:
      path: of the parameter, such as `layers_3/mlp/up_proj/weight`.
      shape: likewise.
      config: the model's.
    """
    return FAMILIES[config.family].source(path, shape, config)
