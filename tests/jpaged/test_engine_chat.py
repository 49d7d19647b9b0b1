# SPDX-License-Identifier: Apache-2.0
"""Conversations through the engine: the prompts that they are, and what becomes of errors."""

import dataclasses
import json
import pathlib

import jax
import pytest
import tokenizers

from jpaged import Engine, EngineConfig, SamplingParams
from jpaged.chat import ChatTemplate
from jpaged.models.decoder import Decoder
from tests.chatting import chatty_model
from tests.jpaged.tiny import TINY, token_ids

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "chat"
CONVERSATIONS = json.loads((FIXTURES / "conversations.json").read_text(encoding="utf-8"))
RECORDS = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))["records"]
MODEL = dataclasses.replace(TINY, vocab_size=272, max_position_embeddings=2048)
GREEDY = SamplingParams(max_tokens=6, temperature=0)
HELLO = [{"role": "user", "content": "Hello"}]


def recorded(model, conversation, **options):
    """The ids that transformers gave."""
    (record,) = (
        record
        for record in RECORDS
        if (record["model"], record["conversation"]) == (model, conversation)
        and record["options"] == options
    )
    return record["token_ids"]


def engine_of(name, **config):
    directory = FIXTURES / "models" / name
    return Engine(
        MODEL,
        jax.tree.map(lambda x: x * 12, Decoder(MODEL).init(jax.random.key(0))),
        EngineConfig(max_num_seqs=4, num_pages=300, **config),
        tokenizers.Tokenizer.from_file(str(FIXTURES / "tokenizer.json")),
        chat_template=ChatTemplate.load(directory),
    )


@pytest.fixture(scope="module")
def engine():
    return engine_of("features")


def test_a_conversation_is_its_prompt(engine):
    messages = CONVERSATIONS["system"]["messages"]
    want = recorded("features", "system", add_generation_prompt=True)
    (output,) = engine.chat(messages, GREEDY)
    assert output.prompt_token_ids == want == engine.chat_prompt(messages)
    assert token_ids([output]) == token_ids(engine.generate([want], GREEDY))
    last = [output for output in engine.stream(engine.chat_prompt(messages), GREEDY)][-1]
    assert token_ids([last]) == token_ids([output])


def test_a_list_of_conversations(engine):
    names = ["one", "many", "unicode"]
    params = [dataclasses.replace(GREEDY, max_tokens=n) for n in (2, 4, 3)]
    seen = []
    outputs = engine.chat(
        [CONVERSATIONS[name]["messages"] for name in names],
        params,
        on_output=lambda index, output: seen.append((index, output.prompt_token_ids)),
    )
    want = [recorded("features", name, add_generation_prompt=True) for name in names]
    assert [output.prompt_token_ids for output in outputs] == want
    assert [len(output.outputs[0].token_ids) for output in outputs] == [2, 4, 3]
    assert sorted(seen) == list(enumerate(want))


def test_tools_documents_and_options_reach_the_template(engine):
    tools, documents = CONVERSATIONS["tools"], CONVERSATIONS["documents"]
    want = recorded("features", "tools", add_generation_prompt=True)
    assert engine.chat_prompt(tools["messages"], tools["tools"]) == want
    want = recorded("features", "documents", add_generation_prompt=True)
    assert engine.chat_prompt(documents["messages"], documents=documents["documents"]) == want
    answered = CONVERSATIONS["answered"]["messages"]
    want = recorded("features", "answered", continue_final_message=True)
    (output,) = engine.chat(answered, GREEDY, continue_final_message=True)
    assert output.prompt_token_ids == want
    rag = engine.chat_prompt(HELLO, chat_template="{{ greeting }}", chat_template_kwargs={
        "greeting": "Hi"
    })  # fmt: skip
    assert rag == engine.tokenizer.encode("Hi", add_special_tokens=False).ids
    with pytest.raises(TypeError, match="unknown"):
        engine.chat(HELLO, GREEDY, unknown=1)


def test_nothing_is_started_of_what_is_refused(engine):
    before = engine.stats().totals
    for messages, message in [
        ([HELLO, [{"role": "user"}]], r"^conversation 1: message 0: content is missing"),
        ([*HELLO, {"content": "a"}], r"^message 1: role is missing"),
        ([HELLO, HELLO[0]], r"^conversation 1: messages=.* must be a list of messages"),
        ([], r"^messages is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            engine.chat(messages, GREEDY)
    with pytest.raises(ValueError, match="2 SamplingParams do not pair with 1 prompts"):
        engine.chat(HELLO, [GREEDY, GREEDY])
    with pytest.raises(ValueError, match=r"prompt of \d+ tokens"):
        engine.chat([{"role": "user", "content": "long " * 1000}], GREEDY)
    assert engine.stats().totals == before and not engine.has_unfinished_requests


def test_a_template_that_refuses_ends_that_request_alone(engine):
    template = "{{ messages[-1].content }}{% if messages | length > 1 %}"
    template += "{{ raise_exception('one at a time') }}{% endif %}"
    with engine.stream(engine.chat_prompt(HELLO), GREEDY) as stream:
        next(stream)
        with pytest.raises(ValueError, match="refuses the conversation: one at a time"):
            engine.chat([HELLO, HELLO * 2], GREEDY, chat_template=template)
        assert list(stream)[-1].finished
    assert len(engine.chat([HELLO, HELLO], GREEDY, chat_template=template)) == 2


def test_pages_are_kept_between_turns():
    engine = engine_of("chatml")
    system = {"role": "system", "content": "Be brief, and say nothing that is not so."}
    messages, num_before = [system, *HELLO], 0
    for turn in range(3):
        before = engine.stats().totals
        (output,) = engine.chat(messages, dataclasses.replace(GREEDY, ignore_eos=True))
        totals = engine.stats().totals
        found = totals.num_hit_tokens - before.num_hit_tokens
        prompt = output.prompt_token_ids
        if turn:
            # All that the turn before had as its prompt, in full pages.
            assert found >= num_before // 16 * 16 > 0
        num_before = len(prompt)
        text = output.outputs[0].text.replace("\N{REPLACEMENT CHARACTER}", "?")
        messages += [{"role": "assistant", "content": text}, *HELLO]
    engine.check_invariants()


def test_load(tmp_path):
    engine = Engine.load(chatty_model(tmp_path / "model"), EngineConfig(num_pages=64))
    (output,) = engine.chat([{"role": "user", "content": "Once upon a time"}], GREEDY)
    want = engine.tokenizer.encode("You said: Once upon a time\n", add_special_tokens=False).ids
    assert output.prompt_token_ids == want
    with pytest.raises(ValueError, match="refuses the conversation: narrators do not talk"):
        engine.chat([{"role": "narrator", "content": "Once"}], GREEDY)


def test_the_demo_was_not_taught_to_chat():
    engine = Engine.load("demo", EngineConfig(num_pages=64))
    with pytest.raises(ValueError, match="the model has no chat template") as error:
        engine.chat(HELLO, GREEDY)
    assert "--chat_template=FILE" in str(error.value) and "\n" not in str(error.value)
    (output,) = engine.chat(HELLO, GREEDY, chat_template="{{ messages[0].content }}")
    assert output.outputs[0].text


def test_wrong_templates_are_refused():
    with pytest.raises(ValueError, match="chat_template='x' must be a ChatTemplate"):
        Engine(MODEL, Decoder(MODEL).init(jax.random.key(0)), chat_template="x")
    with pytest.raises(ValueError, match="default=3 must be a string"):
        ChatTemplate({"default": 3})
