# SPDX-License-Identifier: Apache-2.0
"""Records what Hugging Face generates with logits processors, by models that were recorded before.

Needs the environment of `record_hf_fixtures`:

    python -m scripts.record_hf_processors --output=tests/fixtures/hf

Writes `logits_processors.json` there:

  * `transformers_version`, `torch_version`: those that generated.
  * `records`: one for each generation, alone (batch 1, no sampling, float32), with
      - `case`: the directory of the model;
      - `prompt`: token ids, one of the prompts of its expected.json;
      - `num_beams`, `max_new_tokens`: those of `generate`; no token ends an answer but those of
        `eos_token_id` in
      - `generate`: the arguments that make the processors;
      - `token_ids`: of the answer, or of all hypotheses, best first, what ended it included;
      - `scores`: `sequences_scores` of beams, else null.

A record is kept only if rounding cannot decide it: float64 generates the same.
"""

import itertools
import json
import pathlib
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
import transformers  # pyright: ignore[reportMissingImports]
from absl import app, flags, logging

from scripts.record_hf_fixtures import CASES, Case, load_model

_CASES = ("llama3_rope_hd80_tied", "qwen3_gqa5_hd48_tied")
_MAX_NEW_TOKENS = 16
_NUM_BEAMS = (1, 3)
_NUM_PROMPTS = 3
_RENORMALIZED = (
    {"repetition_penalty": 1.8, "renormalize_logits": True},
    {"repetition_penalty": 0.7, "renormalize_logits": True, "length_penalty": 0.0},
)


def main(argv: list[str]) -> None:
    """Records all cases."""
    del argv
    output = pathlib.Path(flags.FLAGS.output)
    cases = [case for case in CASES if case.name in _CASES]
    records = [record for case in cases for record in _records_of(case, output / case.name)]
    text = ",\n  ".join(json.dumps(record) for record in records)
    versions = {
        "transformers_version": transformers.__version__,
        "torch_version": torch.__version__,
    }
    head = json.dumps(versions)[1:-1]
    (output / "logits_processors.json").write_text(f'{{{head}, "records": [\n  {text}\n]}}\n')
    logging.info("recorded %d generations", len(records))


def _records_of(case: Case, directory: pathlib.Path) -> list[dict[str, Any]]:
    model = load_model(case, directory)
    prompts = json.loads((directory / "expected.json").read_text())["prompts"]
    records = []
    for prompt, num_beams in itertools.product(prompts[1 : 1 + _NUM_PROMPTS], _NUM_BEAMS):
        plain = _generate(model, prompt, num_beams, {})["token_ids"][0]
        for options in (
            {"repetition_penalty": 1.4},
            {"repetition_penalty": 0.8},
            {"suppress_tokens": sorted(set(plain[:6]))},
            {"eos_token_id": sorted(set(plain[2:5])), "min_new_tokens": 7},
            {
                "repetition_penalty": 1.2,
                "suppress_tokens": plain[:1],
                "eos_token_id": plain[3:4],
                "min_new_tokens": 5,
            },
            # Of one sequence, only the scores would change with it.
            *(_RENORMALIZED if num_beams > 1 else ()),
        ):
            record = _generate(model, prompt, num_beams, options)
            exact = _generate(model.double(), prompt, num_beams, options)
            model.float()
            if record["token_ids"] != exact["token_ids"]:
                logging.warning("rounding decides %s of %s: left out", options, directory.name)
                continue
            head = {"case": directory.name, "prompt": prompt, "num_beams": num_beams}
            head |= {"max_new_tokens": _MAX_NEW_TOKENS, "generate": options}
            records.append(head | record)
    return records


def _generate(
    model: transformers.PreTrainedModel, prompt: list[int], num_beams: int, options: dict[str, Any]
) -> dict[str, Any]:
    """Generates for one prompt, alone in its batch."""
    input_ids = torch.tensor([prompt])
    # A model's own stop tokens, or no stop token, would otherwise come in from its config.
    model.generation_config.eos_token_id = None
    output = model.generate(
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        do_sample=False,
        num_beams=num_beams,
        num_return_sequences=num_beams,
        max_new_tokens=_MAX_NEW_TOKENS,
        pad_token_id=-1 % model.config.vocab_size,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    stops = set(options.get("eos_token_id", ()))
    answers = []
    for row in output.sequences[:, len(prompt) :].tolist():
        ends = [place for place, token in enumerate(row) if token in stops]
        answers.append(row[: ends[0] + 1] if ends else row)
    scores = output.sequences_scores.tolist() if num_beams > 1 else None
    return {"token_ids": answers, "scores": scores}


if __name__ == "__main__":
    app.run(main)
