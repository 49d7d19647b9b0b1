# SPDX-License-Identifier: Apache-2.0
"""A job before it runs: which steps it has, by hand; what is said of one that does not compile."""

import pytest

from jpaged import EngineConfig, SamplingParams
from jpaged.host.batch import StepShape
from jpaged.models import find
from jpaged.placement import ModelFiles
from jpaged.scripts.job import encoded, first_shapes, plan_of, wait_for_all
from tests.scripts.programs import ended, run

CONFIG = EngineConfig(max_num_seqs=4, max_num_batched_tokens=32, num_pages=65)
PARAMS = SamplingParams(max_tokens=3)


@pytest.fixture(scope="module")
def demo():
    return ModelFiles.of(find("demo"), CONFIG)


def prompts(*lengths):
    return [[2 + i] * length for i, length in enumerate(lengths)]


def test_a_job_begins_with_what_it_needs_first(demo):
    # 20 tokens of four prompts, whose first tokens come with them, and two more tokens each.
    wanted = [StepShape(32, 4), StepShape(4, 4)]
    assert first_shapes(prompts(5, 5, 5, 5), [PARAMS] * 4, CONFIG, demo) == wanted
    # 40 tokens: 32 of them, then 8 with the first prompt's second token, and so on.
    wanted = [StepShape(32, 4), StepShape(16, 4), StepShape(2, 2)]
    found = first_shapes(prompts(20, 20), [PARAMS] * 2, CONFIG, demo)
    assert found == wanted[: len(found)] and len(found) >= 2


@pytest.mark.parametrize("shapes_of", [first_shapes, plan_of])
def test_a_job_that_cannot_be_served_is_refused(demo, shapes_of):
    """Of all prompts: a job begins with fewer than 100."""
    long = 100 * prompts(4) + prompts(10 * demo.config.max_position_embeddings)
    with pytest.raises(ValueError, match=r"request '100': .*leaves no room"):
        shapes_of(long, [PARAMS] * 101, CONFIG, demo)


def test_prompts_are_what_an_engine_takes(demo):
    assert encoded(["1 15 27", [4]], None, rendered=False) == [[1, 15, 27], [4]]
    assert encoded(["Once"], demo.tokenizer, rendered=False) == ["Once"]
    (ids,) = encoded(["Once"], demo.tokenizer, rendered=True)
    assert demo.tokenizer.decode(ids) == "Once"


def test_the_shape_that_does_not_compile_is_named():
    class Threads:
        closed = False

        def wait(self, shape):
            if shape == StepShape(2, 2):
                raise RuntimeError("out of memory\nmore of it")

        def close(self):
            self.closed = True

    threads = Threads()
    with pytest.raises(ValueError, match=r"^a step of 2x2 does not compile: out of memory$"):
        wait_for_all(threads, [StepShape(1, 1), StepShape(2, 2)])
    assert threads.closed


@pytest.mark.slow
@pytest.mark.nightly
def test_generate_prints_the_plan_and_then_what_it_says(tmp_path):
    plain = ("jpaged", "generate", "--prompt=Once upon a time", "--max_tokens=4", "--temperature=0")
    settings = ("--max_num_seqs=4", "--max_num_batched_tokens=32", "--num_pages=65")
    cache = f"--compilation_cache_dir={tmp_path}"
    want = run(*plain, *settings, cache)
    done = ended(*plain, *settings, cache, "--print_compile_plan")
    lines = [" ".join(line.split()) for line in done.stderr.splitlines()]
    assert any(line.startswith("1 x 1 3 3 0.0%") and line.endswith(" s") for line in lines)
    assert any(line.startswith("16 x 4 1 5 68.8%") and line.endswith(" s") for line in lines)
    assert done.stdout == want
