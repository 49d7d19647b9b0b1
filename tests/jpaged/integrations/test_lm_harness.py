# SPDX-License-Identifier: Apache-2.0
"""lm-evaluation-harness on this engine, beside its own model of transformers."""

import json
import logging
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from tests import tolerances
from tests.scripts.programs import environment

ROOT = pathlib.Path(__file__).resolve().parents[3]
RECORDED = ROOT / "tests" / "fixtures" / "lm_harness.json"
# Sums of 2,000 log-probabilities are rounded to 2^-11 in float32, in which torch adds.
SUM = 2e-7


def test_it_says_what_to_install():
    code = (
        "import sys; sys.modules['lm_eval'] = None\n"
        "import jpaged.integrations\n"
        "import jpaged.integrations.lm_harness"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert done.stderr.strip().endswith("pip install 'jpaged[lm-eval]'")
    assert "jpaged.integrations.lm_harness needs lm-evaluation-harness" in done.stderr


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    """The harness, whose data sets are cached for this session alone."""
    lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: make lm-eval")
    datasets = pytest.importorskip("datasets")
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("datasets")
    return lm_eval


@pytest.fixture(scope="module")
def model(harness, tmp_path_factory):
    from jpaged.scripts.fixtures.record_lm_harness import model_directory

    return model_directory(tmp_path_factory.mktemp("model") / "demo")


@pytest.fixture(scope="module")
def lm(model):
    from jpaged.integrations.lm_harness import JpagedLM

    return JpagedLM(model, max_num_seqs=48)


def evaluated(*arguments, **options):
    from jpaged.scripts.fixtures.record_lm_harness import evaluated

    return evaluated(*arguments, **options)


def hold(found, want):
    """Holds what was found to what the harness's own model has found."""
    assert found.keys() == want.keys()
    for task, own in want.items():
        mine, theirs = found[task]["metrics"], own["metrics"]
        assert mine.keys() == theirs.keys()
        for metric, value in theirs.items():
            rtol = 0 if metric.startswith(("acc", "exact")) else tolerances.LOGPROB
            np.testing.assert_allclose(mine[metric], value, rtol=rtol)
        mine, theirs = answers_of(found[task]), answers_of(own)
        assert len(mine) == len(theirs)
        for answer, other in zip(mine, theirs, strict=True):
            if isinstance(other, str):
                assert answer == other
                continue
            logprob, *greedy = np.atleast_1d(answer)
            other, *others = np.atleast_1d(other)
            np.testing.assert_allclose(logprob, other, atol=tolerances.LOGPROB, rtol=SUM)
            assert greedy == others


def answers_of(task):
    """By document and request: texts, log-probabilities, or these with whether it is greedy."""
    return [answer for document in task["answers"] for request in document for answer in request]


@pytest.mark.slow
@pytest.mark.parametrize("run", ["plain", "chat"])
def test_results_are_those_that_transformers_had(lm, run, tmp_path):
    want = json.loads(RECORDED.read_text(encoding="utf-8"))[run]
    assert {len(answers_of(task)) for task in want.values()} == {18, 8, 6, 3}
    hold(evaluated(lm, tmp_path, run), want)
    lm.engine.check_invariants()


def spaced_llama(directory):
    """A random Llama whose tokenizer adds a first token, and spaces before words."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    from jpaged.scripts.fixtures import record_lm_harness

    texts = [text for text, *_ in record_lm_harness._BEGINNINGS]
    tokenizer.train_from_iterator([*texts, *record_lm_harness._TEXTS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    directory.mkdir()
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        "chat_template": record_lm_harness.TEMPLATE,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=64, intermediate_size=96,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=384, initializer_range=0.3, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    return str(directory)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("run", ["plain", "chat"])
def test_results_are_those_of_transformers(harness, run, tmp_path):
    """Of a model of another kind, where torch is there to ask."""
    pytest.importorskip("torch", reason="needs torch and transformers beside it: see CONTRIBUTING")
    from lm_eval.models.huggingface import HFLM

    from jpaged.integrations.lm_harness import JpagedLM

    directory = spaced_llama(tmp_path / "model")
    want = evaluated(HFLM(pretrained=directory, device="cpu", dtype="float32"), tmp_path, run)
    hold(evaluated(JpagedLM(directory, num_pages=200), tmp_path, run), want)


class Request:
    """What the harness gives a model."""

    def __init__(self, *args):
        self.args = args


def answers(lm, *pairs, **kwargs):
    given = kwargs or {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    requests = [Request(context, given) for context in pairs]
    return lm.generate_until(requests, disable_tqdm=True)


def test_samples_depend_on_their_prompt_and_how_often_it_came(lm):
    first, other, second = answers(lm, "Once upon a time", "The dog", "Once upon a time")
    assert first != second
    assert answers(lm, "The dog", "Once upon a time", "Once upon a time") == [other, first, second]
    given = {"max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "seed": 5}
    assert answers(lm, "Once upon a time", **given) != [first]
    (greedy,) = answers(lm, "Once upon a time", max_gen_toks=12)
    assert [greedy] == answers(lm, "Once upon a time", max_gen_toks=12, temperature=0.0, top_k=3)
    assert greedy not in (first, second)


def test_what_ends_an_answer_counts_behind_its_thoughts(model, lm):
    from jpaged.integrations.lm_harness import JpagedLM

    prompt = "Once upon a time"
    (whole,) = answers(lm, prompt, max_gen_toks=12, until=[""])
    middle = whole[8:12]
    thinking = JpagedLM(lm.engine, think_end_token=middle)
    (rest,) = answers(thinking, prompt, max_gen_toks=12, until=[whole[3:5]])
    assert rest == whole.split(middle)[-1].lstrip().split(whole[3:5])[0] and rest
    assert answers(lm, prompt, max_gen_toks=12, until=whole[3:5]) == [whole.split(whole[3:5])[0]]
    with pytest.raises(ValueError, match="page_size=32 is for an engine that is made here"):
        JpagedLM(lm.engine, page_size=32)


@pytest.mark.slow
def test_what_was_answered_before_is_not_computed_again(harness, lm, tmp_path):
    names, cache = ["jpaged_choices", "jpaged_answers", "jpaged_texts"], str(tmp_path / "answers")
    found = evaluated(lm, tmp_path, "plain", names, use_cache=cache)
    before = lm.engine.stats().totals.num_steps
    assert evaluated(lm, tmp_path, "plain", names, use_cache=cache) == found
    assert lm.engine.stats().totals.num_steps == before
    # Each under the key that the harness looks for.
    assert len(lm.cache_hook.dbdict) == 18 + 6 + 3
    lm.cache_hook.dbdict.close()
    lm.set_cache_hook(harness.api.model.CacheHook(None))


@pytest.mark.slow
def test_the_harnesss_command_line_knows_the_model(model, tmp_path):
    from jpaged.scripts.fixtures.record_lm_harness import write_tasks

    write_tasks(tmp_path)

    def run(*arguments):
        return subprocess.run(
            [
                *(sys.executable, "-m", "jpaged.integrations.lm_harness"),
                *("--model", "jpaged", "--tasks", "jpaged_choices", "--limit", "3"),
                *("--include_path", tmp_path, "--output_path", tmp_path / "out", *arguments),
            ],
            cwd=ROOT, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL,
            env=environment(HF_HOME=str(tmp_path), HF_HUB_OFFLINE="1", JAX_PLATFORMS="cpu"),
        )  # fmt: skip

    done = run("--model_args", f"model={model},max_num_seqs=16,prefix_cache=False")
    assert done.returncode == 0, done.stderr
    assert "|jpaged_choices|" in done.stdout and "acc_norm" in done.stdout
    (file,) = (tmp_path / "out").rglob("results_*.json")
    results = json.loads(file.read_text())
    assert results["results"]["jpaged_choices"]["acc,none"] == 1.0
    assert results["config"]["jpaged_config"]["prefix_cache"] is False
    assert results["config"]["model_num_parameters"] == 2755008
    done = run("--model_args", f"pretrained={model}")
    assert done.returncode == 1
    assert f"pretrained='{model}': give it as model='{model}'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_len": 3}, r"max_len=3 is no argument of the model 'jpaged'; .* max_model_len, "),
        ({"max_length": 64}, r"max_length=64: give it as max_model_len=64"),
        ({"max_num_seqs": 0}, r"max_num_seqs=0 must be at least 1"),
        ({"max_gen_toks": 0}, r"max_gen_toks=0 must be at least 1"),
        ({"prefix_token_id": 2048}, r"prefix_token_id=2048 is outside the vocabulary, \[0, 2048\)"),
        ({"add_bos_token": 1}, r"add_bos_token=1 must be True or False"),
        ({"enable_thinking": "no"}, r"enable_thinking='no' must be True or False"),
        ({"chat_template_kwargs": "a=1"}, r"chat_template_kwargs='a=1' must be a dict"),
        ({"think_end_token": 7}, r"think_end_token=7 must be a string"),
        ({"seed": "x"}, r"seed='x' must be an integer"),
    ],
)
def test_arguments_that_are_refused(model, arguments, message):
    from jpaged.integrations.lm_harness import JpagedLM

    with pytest.raises(ValueError, match=message):
        JpagedLM(model, num_pages=80, **arguments)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"num_beams": 4},
            r"generation_kwargs has num_beams=4; it may have until, .* num_beams is",
        ),
        ({"no_repeat": 2}, r"generation_kwargs has no_repeat=2; it may have until, max_gen_toks"),
        ({"do_sample": True}, r"do_sample=True needs a temperature above 0"),
        ({"temperature": "hot"}, r"generation_kwargs={'temperature': 'hot'}: could not convert"),
        ({"until": [3]}, r"stop=.* must be a list of strings"),
        ({"max_gen_toks": 1024}, r"max_gen_toks=1024 leaves no room .* in max_model_len=1024"),
        ({"top_p": 2.0}, r"top_p=2.0 must be above 0 and at most 1"),
        (["until"], r"generation_kwargs=\['until'\]"),
    ],
)
def test_generation_kwargs_that_are_refused(lm, kwargs, message):
    with pytest.raises(ValueError, match=message):
        lm.generate_until([Request("Once", {}), Request("Once", kwargs)], disable_tqdm=True)
    assert not lm.engine.has_unfinished_requests


def test_texts_that_cannot_be_scored_are_refused(lm):
    with pytest.raises(ValueError, match="the continuation '' adds no token to the context 'Once'"):
        lm.loglikelihood([Request("Once", "")], disable_tqdm=True)
    with pytest.raises(
        ValueError, match="a continuation of 1201 tokens exceeds max_model_len=1024"
    ):
        lm.loglikelihood([Request("Once", " the sea" * 600 + ".")], disable_tqdm=True)


def test_a_context_that_is_too_long_is_cut_aloud(lm, caplog):
    with caplog.at_level(logging.WARNING):
        (cut,) = lm.loglikelihood([Request("A tree. " + "The sea. " * 400, "The king")], True)
        (fits,) = lm.loglikelihood([Request("The sea. " * 400, "The king")], True)
    np.testing.assert_allclose(cut[0], fits[0], atol=tolerances.LOGPROB)
    assert "loses its first" in caplog.text and "max_model_len=1024" in caplog.text


def test_texts_begin_as_they_are_told(model, lm):
    from jpaged.integrations.lm_harness import JpagedLM

    bare = lm.tok_encode("Once", add_special_tokens=False)
    assert lm.tok_encode("Once") == [0, *bare] == lm.tok_encode("<|bos|>Once")
    without = JpagedLM(lm.engine, add_bos_token=False, prefix_token_id=5)
    assert without.tok_encode("Once") == bare and without.prefix_token_id == 5
    assert JpagedLM(lm.engine, add_bos_token=True).tok_encode("Once") == [0, *bare]
    assert (lm.prefix_token_id, lm.eot_token_id, lm.max_length) == (0, 1, 1024)
    shipped = JpagedLM(num_pages=80)  # it has no tokenizer_config.json
    assert (shipped.prefix_token_id, shipped.eot_token_id) == (0, 1)


def test_chat_templates(lm, caplog):
    from jpaged.integrations.lm_harness import JpagedLM

    talk = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Once"}]
    assert lm.apply_chat_template(talk[:1]) == "<|bos|>user: Hello<|eos|>\nassistant:"
    begun = "<|bos|>user: Hello<|eos|>\nassistant: Once"
    assert lm.apply_chat_template(talk, add_generation_prompt=False) == begun
    assert "assistant:" in lm.chat_template(True) and lm.chat_template(False) is None
    refuses = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}ok{{ mood }}"
    )
    other = JpagedLM(lm.engine, chat_template=refuses, chat_template_kwargs={"mood": "!"})
    assert other.apply_chat_template([{"role": "system", "content": "x"}, talk[0]]) == "ok!"
    assert "messages of the system are left out" in caplog.text
    assert other.chat_template(True) == refuses
    with pytest.raises(ValueError, match="apply_chat_template='tool_use' names a template, and"):
        other.chat_template("tool_use")
    assert other.tokenizer_name != lm.tokenizer_name == JpagedLM(lm.engine).tokenizer_name
    with pytest.raises(ValueError, match="the model has no chat template"):
        JpagedLM(num_pages=80).apply_chat_template(talk[:1])
