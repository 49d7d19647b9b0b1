# SPDX-License-Identifier: Apache-2.0
"""Measures transformers' `generate`: eager, and with a compiled static cache.

    PATH scripts/kernels/transformers_steps.py JOB ANSWERS

`device_figures` runs it with an interpreter that has torch and transformers, and nothing of jpaged.
JOB is JSON: `config` (a config.json), `dtype`, `rows` (a list), `prompt_len`, `output_len`. ANSWERS
gets one JSON object a measurement, as it comes: `cache` (eager or static), `rows`, `tokens_per_s`
(the fastest of two, after one that compiles) and `first_s` (that one's seconds).
"""

import json
import pathlib
import sys
import time


def main(job_path: str, answers_path: str) -> None:
    """Measures, eager first: it takes seconds, and a static cache may not compile in time."""
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    job = json.loads(pathlib.Path(job_path).read_text(encoding="utf-8"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = dict(job["config"])
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    with torch.device(device):
        dtype = getattr(torch, job["dtype"])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    def generate(prompts, options):
        with torch.inference_mode():
            model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                min_new_tokens=job["output_len"],
                max_new_tokens=job["output_len"],
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
        if device == "cuda":
            torch.cuda.synchronize()

    for cache, options in (("eager", {}), ("static", {"cache_implementation": "static"})):
        for rows in job["rows"]:
            shape = rows, job["prompt_len"]
            prompts = torch.randint(0, config.vocab_size, shape, device=device)
            took = []
            for _ in range(3):
                start = time.perf_counter()
                generate(prompts, options)
                took.append(time.perf_counter() - start)
            tokens_per_s = rows * job["output_len"] / min(took[1:])
            answer = {"cache": cache, "rows": rows, "tokens_per_s": tokens_per_s}
            with open(answers_path, "a", encoding="utf-8") as answers:
                answers.write(json.dumps(answer | {"first_s": took[0]}) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
