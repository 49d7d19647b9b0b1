# SPDX-License-Identifier: Apache-2.0
"""How a task of lm-evaluation-harness wants to be answered, as parameters of requests."""

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

from lm_eval.models.utils import (  # pyright: ignore[reportMissingImports]
    handle_stop_sequences,
    normalize_gen_kwargs,
)

from jpaged.host.checks import checked, shown
from jpaged.host.params import SamplingParams

# What goes on as it is.
_PASSED = (
    *("top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("logit_bias", "sequence_bias", "min_tokens", "suppress_tokens", "bad_words_ids"),
    *("allowed_token_ids", "stop_token_ids", "ignore_eos"),
)
_KNOWN = ("until", "max_gen_toks", "do_sample", "temperature", "seed", "num_beams", *_PASSED)


@dataclasses.dataclass(frozen=True)
class Asked:
    """How one prompt is to be answered.

    Attributes:
      params: of the request.
      until: what ends the answer, as text; it is cut there.
    """

    params: SamplingParams
    until: list[str]


@dataclasses.dataclass(frozen=True)
class KwargsReader:
    """Reads `generation_kwargs` of tasks.

    Attributes:
      max_gen_toks: most tokens of an answer where a task does not say.
      seed: of samples where a task does not say.
      eos: what ends any answer, as text; None where nothing does.
      thinks: whether answers begin with thoughts, in which a task's strings say nothing.
    """

    max_gen_toks: int
    seed: int
    eos: str | None
    thinks: bool

    def read(self, context: str, given: Mapping[str, Any], count: int) -> Asked:
        """Reads those of one prompt.

        Args:
          context: the prompt.
          given: the task's generation_kwargs.
          count: how often the same prompt came before; each time other samples are drawn.

        Raises:
          ValueError: if there is what is not known, or cannot be met.
        """
        try:
            kwargs: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until = handle_stop_sequences(kwargs.pop("until"), eos=self.eos)
        except (AttributeError, TypeError, ValueError) as e:
            raise ValueError(f"generation_kwargs={shown(given)}: {e}") from e
        for name, value in kwargs.items():
            if name not in _KNOWN or (name == "num_beams" and value != 1):
                raise ValueError(
                    f"generation_kwargs has {name}={shown(value)}; it may have "
                    f"{', '.join(_KNOWN)}, and num_beams is 1"
                )
        temperature = kwargs.get("temperature", 0.0)
        if not kwargs["do_sample"]:
            temperature = 0.0
        elif temperature == 0:
            raise ValueError(
                f"generation_kwargs={shown(given)}: do_sample=True needs a temperature above 0; "
                "give temperature=1.0, or leave do_sample alone"
            )
        seed = checked("seed", kwargs.get("seed", self.seed), int)
        ends = [text for text in until if text == self.eos or not self.thinks]
        params = SamplingParams(
            max_tokens=kwargs["max_gen_toks"],
            temperature=temperature,
            seed=_seed_of(seed, context, count),
            stop=tuple(filter(None, ends)),
            **{name: kwargs[name] for name in _PASSED if name in kwargs},
        )
        return Asked(params, until)


def _seed_of(seed: int, context: str, count: int) -> int:
    """Of a sample: whatever else is evaluated, it is the same."""
    text = f"{seed} {count} {context}".encode(errors="surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=4).digest(), "little")
