# SPDX-License-Identifier: Apache-2.0
"""Records Hugging Face's beam searches of the models that `record_hf_fixtures` has saved.

Needs the same environment, and leaves its files as they are:

    python -m scripts.record_hf_beams --output=tests/fixtures/hf

Writes one `beams.json` beside the `expected.json` of some cases:

  * `transformers_version`, `torch_version`: those that searched.
  * `records`: one for each search, alone (batch 1, no sampling, float32, KV cache on), with
      - `prompt`: token ids, one of the prompts of expected.json;
      - `beam_width`, `length_penalty`, `early_stopping`, `max_tokens`: `num_beams`,
        `length_penalty`, `early_stopping` and `max_new_tokens` of `generate`;
      - `stop_token_ids`: its `eos_token_id`, maybe empty. They are tokens that the same search
        without them returns, so chosen that hypotheses end at different lengths and that the values
        of `early_stopping` lead to different results, where they can;
      - `token_ids`: of all `beam_width` hypotheses, best first: what was generated, a token that
        ended it included, without padding;
      - `scores`: their `sequences_scores`.

A record is kept only if rounding cannot decide what it holds, since another float32 implementation
rounds differently: neighbouring scores lie at least 1e-4 apart, the same model in float64 without a
cache returns the same tokens, and so it does, several times over, with noise of up to 1e-4 on
every log-probability. The noise is for choices that the returned scores do not show: which beams
went on, and when the search ended. Where a record is dropped, other stop tokens take its place.
"""

import collections
import copy
import dataclasses
import itertools
import json
import pathlib
from typing import Any

import numpy as np
import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from absl import app, flags, logging

from scripts.record_hf_fixtures import CASES, Case, dump_expected, load_model, shortest_float32

# The case with most query heads a KV head of each family.
_CASES = ("llama3_rope_hd80_tied", "qwen3_gqa5_hd48_tied")
_MAX_BEAMS_BYTES = 150_000
# How far apart the scores of a recorded search must be, and the noise that must not change it.
_REQUIRED_SCORE_GAP = 1e-4
_BEAM_NOISE = 1e-4
_NUM_NOISY_SEARCHES = 4
# As many frequent tokens of a search without stop tokens are tried as stop tokens.
_MAX_STOP_CANDIDATES = {1: 40, 2: 10}


@dataclasses.dataclass(frozen=True)
class BeamPlan:
    """Beam searches to record for a case: one for each value of early_stopping.

    Attributes:
      beam_width: Number of beams.
      length_penalty: Exponent of the length.
      num_stops: How many stop tokens to choose.
      prompt_length: Which prompt of expected.json to begin with.
      max_tokens: Most tokens to generate.
      early_stopping: The values.
    """

    beam_width: int
    length_penalty: float
    num_stops: int
    prompt_length: int
    max_tokens: int
    early_stopping: tuple[bool | str, ...] = (False, True, "never")


# Every width with every penalty; without stop tokens early_stopping makes no difference.
_BEAM_PLANS = (
    BeamPlan(2, 1.0, 1, 7, 24),
    BeamPlan(2, 0.0, 0, 16, 1, (True,)),
    BeamPlan(2, 2.0, 2, 16, 20),
    BeamPlan(2, -0.5, 1, 33, 24),
    BeamPlan(4, 1.0, 2, 1, 24),
    BeamPlan(4, 0.0, 1, 16, 24),
    BeamPlan(4, 2.0, 1, 33, 16),
    BeamPlan(4, -0.5, 0, 7, 20, (False,)),
    BeamPlan(7, 1.0, 1, 33, 24),
    BeamPlan(7, 0.0, 2, 7, 20),
    BeamPlan(7, 2.0, 0, 1, 12, ("never",)),
    BeamPlan(7, -0.5, 2, 16, 24),
)


class _Noise(transformers.LogitsProcessor):
    """Adds noise to log-probabilities."""

    def __init__(self, seed: int):
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.rand(scores.shape, generator=self._generator)
        return scores + _BEAM_NOISE * (2 * noise - 1)


def search_beams(
    model: transformers.PreTrainedModel, search: dict[str, Any], **options: Any
) -> dict[str, Any]:
    """Runs a beam search for one prompt, alone in its batch.

    Args:
      model: The model.
      search: A record of beams.json as far as it says what to search.
      **options: More arguments of `generate`.

    Returns:
      The rest of the record.
    """
    input_ids = torch.tensor([search["prompt"]])
    pad_token_id = model.config.vocab_size  # No token has it.
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        num_beams=search["beam_width"],
        num_return_sequences=search["beam_width"],
        length_penalty=search["length_penalty"],
        early_stopping=search["early_stopping"],
        eos_token_id=search["stop_token_ids"] or None,
        pad_token_id=pad_token_id,
        max_new_tokens=search["max_tokens"],
        output_scores=True,
        return_dict_in_generate=True,
        **options,
    )
    hypotheses = []
    for tokens in output.sequences[:, input_ids.shape[1] :].tolist():
        ends = (i + 1 for i, token in enumerate(tokens) if token in search["stop_token_ids"])
        length = next(ends, search["max_tokens"])
        assert pad_token_id not in tokens[:length] and len(tokens[:length]) == length
        assert set(tokens[length:]) <= {pad_token_id}
        hypotheses.append(tokens[:length])
    scores = output.sequences_scores.tolist()
    return {"token_ids": hypotheses, "scores": [shortest_float32(x) for x in scores]}


def is_robust(model64: transformers.PreTrainedModel, record: dict[str, Any]) -> bool:
    """Returns whether rounding cannot change what a search returned.

    Args:
      model64: The model in float64.
      record: A record of beams.json.
    """
    scores, token_ids = record["scores"], record["token_ids"]
    assert scores == sorted(scores, reverse=True)
    if any(a - b < _REQUIRED_SCORE_GAP for a, b in itertools.pairwise(scores)):
        return False
    exact = search_beams(model64, record, use_cache=False)
    if exact["token_ids"] != token_ids:
        return False
    np.testing.assert_allclose(scores, exact["scores"], rtol=1e-5, atol=1e-5)
    return all(
        search_beams(model64, record, logits_processor=[_Noise(seed)])["token_ids"] == token_ids
        for seed in range(_NUM_NOISY_SEARCHES)
    )


def stop_token_choices(
    model: transformers.PreTrainedModel, plan: BeamPlan, prompt: list[int]
) -> list[tuple[int, ...]]:
    """Returns which stop tokens to try: those that a search without them returns often.

    Args:
      model: The model.
      plan: The searches.
      prompt: Token ids.
    """
    if not plan.num_stops:
        return [()]
    (search,) = _searches(plan, prompt, (), (False,))
    found = search_beams(model, search)["token_ids"]
    counts = collections.Counter(itertools.chain.from_iterable(found))
    frequent = [token for token, _ in counts.most_common(_MAX_STOP_CANDIDATES[plan.num_stops])]
    return list(itertools.combinations(frequent, plan.num_stops))


def _searches(
    plan: BeamPlan,
    prompt: list[int],
    stop_token_ids: tuple[int, ...],
    early_stopping: tuple[bool | str, ...],
) -> list[dict[str, Any]]:
    return [
        {
            "prompt": prompt,
            "beam_width": plan.beam_width,
            "length_penalty": plan.length_penalty,
            "early_stopping": value,
            "stop_token_ids": list(stop_token_ids),
            "max_tokens": plan.max_tokens,
        }
        for value in early_stopping
    ]


def _variety(records: list[dict[str, Any]]) -> tuple[int, int]:
    """Returns how many results differ, and how many lengths their hypotheses have."""
    results = {json.dumps(record["token_ids"]) for record in records}
    lengths = {len(tokens) for record in records for tokens in record["token_ids"]}
    return len(results), len(lengths)


def find_beam_records(
    model: transformers.PreTrainedModel,
    model64: transformers.PreTrainedModel,
    plan: BeamPlan,
    prompt: list[int],
) -> list[dict[str, Any]]:
    """Chooses stop tokens that make the searches of a plan varied and robust.

    Args:
      model: The model.
      model64: The model in float64.
      plan: The searches.
      prompt: Token ids.

    Returns:
      The records of the plan.

    Raises:
      RuntimeError: If no choice is good enough.
    """
    tried = [
        [
            search | search_beams(model, search)
            for search in _searches(plan, prompt, stops, plan.early_stopping)
        ]
        for stops in stop_token_choices(model, plan, prompt)
    ]
    for records in sorted(tried, key=_variety, reverse=True):
        if all(is_robust(model64, record) for record in records):
            num_results, num_lengths = _variety(records)
            logging.info("%s: %d results, %d lengths", plan, num_results, num_lengths)
            return records
    raise RuntimeError(f"{plan}: no robust result among {len(tried)}")


def record_beams(case: Case, output: pathlib.Path) -> None:
    """Records the beam searches of a case.

    Args:
      case: The case, which was recorded before.
      output: Directory that holds the directory of the case.
    """
    case_dir = output / case.name
    model = load_model(case, case_dir)
    model64 = copy.deepcopy(model).to(torch.float64)
    expected = json.loads((case_dir / "expected.json").read_text())
    prompts = {len(prompt): prompt for prompt in expected["prompts"]}
    records = []
    for plan in _BEAM_PLANS:
        records += find_beam_records(model, model64, plan, prompts[plan.prompt_length])
    text = dump_expected(
        {
            "transformers_version": transformers.__version__,
            "torch_version": torch.__version__,
            "records": records,
        }
    )
    assert len(text) <= _MAX_BEAMS_BYTES, f"{case.name}: {len(text)} bytes"
    (case_dir / "beams.json").write_text(text)
    logging.info("%s: %d bytes, %d beam searches", case.name, len(text), len(records))


def main(argv: list[str]) -> None:
    """Records the beam searches of some cases."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    # Otherwise the last bits of scores depend on the machine's cores.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    for case in CASES:
        if case.name in _CASES:
            record_beams(case, pathlib.Path(flags.FLAGS.output))


if __name__ == "__main__":
    app.run(main)
