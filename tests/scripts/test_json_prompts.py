# SPDX-License-Identifier: Apache-2.0
"""Prompts as JSON: each with parameters of its own, and what is wrong named by its line."""

import pytest

from jpaged import SamplingParams
from jpaged.scripts.conversations import read_conversations
from jpaged.scripts.json_prompts import read_json_prompts

PATH = "dir/prompts.jsonl"
FLAGS = SamplingParams(max_tokens=9, seed=1)


def test_own_parameters_win_over_those_of_the_flags():
    lines = [
        '{"prompt": "caf\\u00e9"}',
        '{"prompt": [1, 2], "temperature": null, "seed": 7, "stop": "x", "logit_bias": {"5": -1}}',
        '{"max_tokens": 3, "prompt": "b", "beam_width": 2, "early_stopping": "never"}',
        '{"prompt": "c", "max_tokens": null, "n": null, "sequence_bias": [[[10, 45], -2]]}',
    ]
    assert read_json_prompts(lines, PATH, FLAGS) == [
        ("café", FLAGS),
        ([1, 2], SamplingParams(max_tokens=9, seed=7, stop=("x",), logit_bias={5: -1.0})),
        ("b", SamplingParams(max_tokens=3, seed=1, beam_width=2, early_stopping="never")),
        ("c", SamplingParams(seed=1, sequence_bias={(10, 45): -2.0})),
    ]


WRONG = [
    ('{"prompt": "a", "topp": 1}', "unknown field 'topp'; there are prompt, max_tokens, "),
    ('{"prompt": "a", "messages": []}', "unknown field 'messages'; there are prompt, "),
    ('{"prompt": "a", "top_p": 2}', "top_p=2.0 must be above 0 and at most 1"),
    ('{"prompt": "a", "top_p": "1"}', "top_p='1' must be a number"),
    ('{"prompt": "a", "n": true}', "n=True must be an integer"),
    ('{"prompt": "a", "temperature": NaN}', "temperature=nan must be finite"),
    ('{"prompt": "a", "seed": -1}', "seed=-1 must be in [0, 2**32)"),
    ('{"prompt": "a", "logit_bias": {"x": 1}}', "logit_bias={'x': 1} must be a dictionary from"),
    ('{"prompt": "a", "logit_bias": {"5": 101}}', "must be between -100 and 100"),
    ('{"prompt": "a", "presence_penalty": 3}', "presence_penalty=3.0 must be between -2 and 2"),
    ('{"prompt": "a", "bad_words_ids": [[]]}', "must be free of sequences without a token"),
    ('{"prompt": "a", "allowed_token_ids": []}', "must be of at least one token"),
    ('{"prompt": "a", "min_tokens": 10}', "min_tokens=10 must be at most max_tokens=9"),
    ('{"prompt": "a", "beam_width": 2, "presence_penalty": 1}', "has no meaning in beam search"),
    ('{"prompt": "a", "stop": "\\ud800"}', "is half of a surrogate pair"),
    ('{"prompt": "a", "n": 1, "n": 2}', "it has the field 'n' twice"),
    ('{"prompt": "a", "logit_bias": {"5": 1, "5": 2}}', "it has the field '5' twice"),
    ('{"prompt": "a", "logit_bias": {"5": 1, "05": 2}}', "each token once"),
    ('{"prompt": "a"', "it is not valid JSON: "),
    ("a", "it is not valid JSON: Expecting value"),
    ("[" * 100_000, "it is not valid JSON: it is nested too deeply"),
    ('{"prompt": "a", "n": ' + "9" * 5000 + "}", "it is not valid JSON: Exceeds the limit"),
    ('{"n": 1}', "must be an object with a prompt, such as {"),
    ("[1]", "[1] must be an object with a prompt"),
    ("null", "None must be an object with a prompt"),
    ('{"prompt": ""}', "prompt='' must be text or token ids, not empty"),
    ('{"prompt": []}', "prompt=[] must be text or token ids, not empty"),
    ('{"prompt": [1.5]}', "prompt=[1.5] must be text or token ids, not empty"),
    ('{"prompt": [true]}', "prompt=[True] must be text or token ids, not empty"),
    ('{"prompt": null}', "prompt=None must be text or token ids, not empty"),
    ('{"prompt": {"a": 1}}', "prompt={'a': 1} must be text or token ids, not empty"),
]


@pytest.mark.parametrize(("line", "message"), WRONG)
def test_what_is_wrong_is_named_by_its_line(line, message):
    with pytest.raises(ValueError) as error:
        read_json_prompts(['{"prompt": "good"}', line], PATH, FLAGS)
    text = str(error.value)
    assert text.startswith(f"{PATH}: line 2: ") and message in text and "\n" not in text
    assert len(text) < 1000


class TestConversations:
    HELLO = '[{"role": "user", "content": "Hello"}]'

    def test_with_parameters(self):
        lines = [self.HELLO, f'{{"messages": {self.HELLO}, "tools": [], "max_tokens": 3}}']
        messages = [{"role": "user", "content": "Hello"}]
        assert read_conversations(lines, FLAGS) == [
            ({"messages": messages}, FLAGS),
            ({"messages": messages, "tools": []}, SamplingParams(max_tokens=3, seed=1)),
        ]

    @pytest.mark.parametrize(
        ("own", "message"),
        [
            ('"topp": 1', "unknown field 'topp'; there are messages, tools, documents, max_tokens"),
            ('"prompt": "x"', "unknown field 'prompt'; there are messages"),
            ('"top_p": 2', "top_p=2.0 must be above 0 and at most 1"),
            ('"n": 1, "n": 2', "the conversation has the field 'n' twice"),
        ],
    )
    def test_what_is_wrong_is_named_by_its_prompt(self, own, message):
        line = f'{{"messages": {self.HELLO}, {own}}}'
        with pytest.raises(ValueError, match=r"^prompt 2: ") as error:
            read_conversations([self.HELLO, line], FLAGS)
        assert message in str(error.value)
