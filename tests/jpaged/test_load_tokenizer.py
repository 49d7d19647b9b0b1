# SPDX-License-Identifier: Apache-2.0
"""tokenizer.json at the door: what is read, and that anything else is refused in one line."""

import copy
import json
import os
import pathlib
import random

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from jpaged.detokenizer import Detokenizer
from jpaged.text import TextStream, load_tokenizer

DEMO = pathlib.Path(__file__).resolve().parents[2] / "models" / "demo"
DAMAGED = r"tokenizer\.json is not a readable tokenizer: .+"


def byte_level():
    """With all that the fields of a file can be, but few tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "</s>", *alphabet, "he"])}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, [("h", "e")]))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return tokenizer


def byte_fallback():
    tokens = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "h", "e", "▁he"]
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [("▁", "h"), ("▁h", "e")]
    vocab["▁h"] = len(vocab)
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True)
    )
    tokenizer.add_special_tokens(["<unk>", "<s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])]
    )
    return tokenizer


def load(directory, content):
    (directory / "tokenizer.json").write_bytes(content)
    return load_tokenizer(directory)


def test_reads_what_was_saved(tmp_path):
    for tokenizer in (byte_level(), byte_fallback()):
        loaded = load(tmp_path, tokenizer.to_str().encode())
        assert loaded.encode("he 🙂").ids == tokenizer.encode("he 🙂").ids
    assert load_tokenizer(DEMO).get_vocab_size() == 2048


def test_what_training_saved_is_dropped(tmp_path):
    tokenizer = byte_level()
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=50)
    assert len(load(tmp_path, tokenizer.to_str().encode()).encode("hello").ids) == 5


def test_none(tmp_path):
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize(
    "content",
    [
        b"", b" ", b"{}", b"[1]", b"null", b'"x"', b"7", b'{"version": "1.0"', b"\xff\xfe",
        b"\0" * 9, b"[" * 100_000, b'{"model":' * 100_000, b"{" + b'"a":1,' * 9 + b'"a":1}',
    ],
    ids=lambda content: repr(content[:12]),
)  # fmt: skip
def test_damaged(tmp_path, content):
    with pytest.raises(ValueError, match=DAMAGED) as error:
        load(tmp_path, content)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_other_encodings(tmp_path):
    text = byte_level().to_str()
    for content in (text.encode("utf-16"), text.encode("utf-8-sig"), text.encode("utf-32")):
        with pytest.raises(ValueError, match=DAMAGED):
            load(tmp_path, content)


def test_what_is_no_file(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(ValueError, match="no regular file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").rmdir()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(ValueError, match="no regular file"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").symlink_to("gone")
    with pytest.raises(ValueError, match=DAMAGED):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["template", "sequence"])
def test_a_template_of_a_token_that_is_not_explained(tmp_path, tokenizer):
    fields = json.loads(tokenizer.to_str())
    for processor in fields["post_processor"].get("processors", [fields["post_processor"]]):
        processor["special_tokens"] = {}
    with pytest.raises(ValueError, match=r"post_processor\.special_tokens has no '<s>'"):
        load(tmp_path, json.dumps(fields).encode())


def test_a_decoder_that_crashes(tmp_path):
    fields = json.loads(byte_fallback().to_str())
    fields["decoder"]["decoders"][-1]["stop"] = 1
    with pytest.raises(ValueError, match="Strip with stop above 0"):
        load(tmp_path, json.dumps(fields).encode())


def test_a_panic_is_a_refusal_and_ctrl_c_is_not(tmp_path, monkeypatch):
    # Encoding with a template of an unknown token panics; `_check_template` is there to avoid it.
    fields = json.loads(byte_level().to_str())
    fields["post_processor"]["special_tokens"] = {}
    broken = tokenizers.Tokenizer.from_str(json.dumps(fields))
    monkeypatch.setattr("jpaged.text._check_template", lambda tokenizer: broken.encode("he"))
    with pytest.raises(ValueError, match=r"tokenizer: no entry found for key"):
        load(tmp_path, byte_level().to_str().encode())

    def interrupt(tokenizer):
        raise KeyboardInterrupt

    monkeypatch.setattr("jpaged.text._check_template", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load_tokenizer(tmp_path)


VALUES = [None, True, -1, 0, 1.5, 10**30, 2**32 - 1, "", "x", [], {}, [1], {"type": "x"}, "\ud800"]


def fields_of(tree, path=()):
    """The paths of a tree's fields; of long lists and tables some."""
    yield path
    children = list(tree.items()) if isinstance(tree, dict) else ()
    children = list(enumerate(tree)) if isinstance(tree, list) else children
    for key, child in [*children[:12], *children[12::90]]:
        yield from fields_of(child, (*path, key))


def mutants(tokenizer):
    """A wrong value in each field, each field left out, and files that broke on their way."""
    whole = json.loads(tokenizer.to_str())
    for path in list(fields_of(whole))[1:]:
        for value in (*VALUES, ...):
            tree = copy.deepcopy(whole)
            parent = tree
            for key in path[:-1]:
                parent = parent[key]
            if value is ...:
                del parent[path[-1]]
            else:
                parent[path[-1]] = value
            yield json.dumps(tree).encode()
    rng = random.Random(0)
    content = tokenizer.to_str().encode()
    for _ in range(150):
        yield content[: rng.randrange(len(content))]
        at = rng.randrange(len(content))
        yield content[:at] + rng.randbytes(rng.randrange(1, 4)) + content[at + 1 :]


@pytest.mark.slow
@pytest.mark.parametrize("tokenizer", [byte_level(), byte_fallback()], ids=["bytes", "fallback"])
def test_any_wrong_file_is_refused_in_one_line_or_serves(tmp_path, tokenizer):
    num_refused = num_served = 0
    for content in mutants(tokenizer):
        try:
            loaded = load(tmp_path, content)
        except ValueError as e:
            assert str(tmp_path / "tokenizer.json") in str(e)
            assert "\n" not in str(e) and len(str(e)) < 600
            num_refused += 1
            continue
        num_served += 1
        ids = loaded.encode("he wörld 🙂 ▁").ids
        stream = TextStream(Detokenizer(loaded), ("zz",), ids[:2])
        for token in ids[2:]:
            stream.add(token)
        stream.flush()
    assert num_refused > 300 and num_served > 30
