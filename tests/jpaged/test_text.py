# SPDX-License-Identifier: Apache-2.0
"""Text as it comes: what is released when, beside what the whole decodes to."""

import codecs
import json

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jpaged.text import TextStream

MARK = "\N{REPLACEMENT CHARACTER}"
CORPUS = [
    "the quick brown fox jumps over the lazy dog. " * 3,
    "stop STOP abab abcabc the end of the tale. héllo naïve café 你好世界 🙂👍🏽",
] * 10


def byte_level():
    """As of Llama 3 and Qwen3: every byte is a token, and pieces of the corpus are."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_fallback():
    """As of Llama 2: a mark stands for a space, and what has no token is spelled in bytes."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True))
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
    special = ["<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([CORPUS[0]], trainer)
    # Bytes are ordinary tokens: they are part of the text.
    fields = json.loads(tokenizer.to_str())
    fields["added_tokens"] = fields["added_tokens"][:2]
    return tokenizers.Tokenizer.from_str(json.dumps(fields))


TOKENIZER, FALLBACK = byte_level(), byte_fallback()
EOS = TOKENIZER.token_to_id("</s>")
# GPT-2's alphabet: a byte that can be printed is written as itself, the others in order from 256.
PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_CHARS = {byte: chr(byte) for byte in PRINTABLE}
BYTE_CHARS |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))}
BYTES = {char: byte for byte, char in BYTE_CHARS.items()}


def byte_ids(text):
    """One token a byte, for text or bytes."""
    data = text if isinstance(text, bytes) else text.encode()
    return [TOKENIZER.token_to_id(BYTE_CHARS[byte]) for byte in data]


def fallback_ids(*tokens):
    ids = [FALLBACK.token_to_id(token) for token in tokens]
    assert None not in ids
    return ids


def encode(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def run(ids, stop=(), tokenizer=TOKENIZER, **kwargs):
    """Adds tokens until the text stops, then flushes.

    Returns: the stream, its text after each token, and the tokens that it took.
    """
    stream = TextStream(tokenizer, stop, **kwargs)
    texts = []
    for token in ids:
        stream.add(token)
        texts.append(stream.text)
        if stream.stopped:
            break
    stream.flush()
    return stream, texts, ids[: len(texts)]


def bytes_of(ids):
    return bytes(BYTES[char] for i in ids for char in TOKENIZER.id_to_token(i))


def certain(ids):
    """The text of the characters that are complete, by Python's decoder."""
    return codecs.getincrementaldecoder("utf-8")("replace").decode(bytes_of(ids))


def first_cut(text, stop):
    """`text` up to the first occurrence of any stop string."""
    return text[: min([at for s in stop if (at := text.find(s)) >= 0], default=len(text))]


def test_the_tokenizers_are_what_they_should_be():
    assert sorted(TOKENIZER.token_to_id(char) for char in BYTE_CHARS.values()) == [*range(2, 258)]
    assert len(encode("the quick")) < 5
    assert TOKENIZER.decode(byte_ids("añ🙂 b")) == "añ🙂 b"
    assert [FALLBACK.id_to_token(i) for i in FALLBACK.encode(" 🙂").ids][-4:] == [
        "<0xF0>",
        "<0x9F>",
        "<0x99>",
        "<0x82>",
    ]
    for text in ("the dog", " two  spaces ", "new\nline 🙂 é"):
        assert FALLBACK.decode(FALLBACK.encode(text).ids) == text
        assert TOKENIZER.decode(encode(text)) == text


TEXTS = {
    "ascii": "the quick brown fox",
    "emoji": "a🙂b👍🏽c",
    "family": "\N{WOMAN}\u200d\N{WOMAN}\u200d\N{GIRL}!",
    "flag": "\N{REGIONAL INDICATOR SYMBOL LETTER S}\N{REGIONAL INDICATOR SYMBOL LETTER E}",
    "combining": "e\u0301o\u0308\u0323 x\u20d7",
    "cjk": "你好,世界。𠜎",
    "right to left": "שלום مرحبا",
    "controls": "a\tb\r\n\x00\x7f c",
    "spaces": "  a  b \u00a0\u3000 ",
    "replacement mark": f"a{MARK}b{MARK}",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
class TestCharacters:
    def test_byte_by_byte(self, text):
        """A character appears with its last byte: never before, never as a mark, never later."""
        ids = byte_ids(text)
        stream, texts, _ = run(ids)
        for count, seen in enumerate(texts, start=1):
            assert seen == certain(ids[:count])
        assert stream.text == text
        assert not stream.stopped

    def test_as_the_tokenizer_cuts_it(self, text):
        ids = encode(text)
        stream, texts, _ = run(ids)
        assert stream.text == TOKENIZER.decode(ids) == text
        assert all(text.startswith(seen) for seen in texts)

    def test_every_character_as_a_stop_string(self, text):
        for ids in (byte_ids(text), encode(text)):
            for char in text:
                stream, _, taken = run(ids, (char,))
                assert stream.stopped
                assert stream.text == text[: text.index(char)]
                if ids == byte_ids(text) and char != MARK:
                    # With the character's last byte, and no token later.
                    assert len(taken) == len(text[: text.index(char) + 1].encode())

    def test_byte_fallback(self, text):
        ids = FALLBACK.encode(text).ids
        stream, texts, _ = run(ids, tokenizer=FALLBACK)
        assert stream.text == FALLBACK.decode(ids) == text
        assert all(text.startswith(seen) for seen in texts)
        assert MARK in text or not any(MARK in seen for seen in texts)


class TestTheEnd:
    def test_incomplete_character(self):
        """Held back while it may be completed; shown as a mark when nothing more comes."""
        ids = byte_ids(b"ab\xf0\x9f\x99")
        stream = TextStream(TOKENIZER, ())
        for token in ids:
            stream.add(token)
        assert stream.text == "ab"
        stream.flush()
        assert stream.text == "ab" + MARK == TOKENIZER.decode(ids)

    def test_incomplete_character_that_breaks_off(self):
        ids = byte_ids(b"a\xf0\x9f") + byte_ids("b")
        stream = TextStream(TOKENIZER, ())
        texts = []
        for token in ids:
            stream.add(token)
            texts.append(stream.text)
        assert texts == ["a", "a", "a", f"a{MARK}b"]

    def test_special_tokens_are_no_text(self):
        ids = [*byte_ids("a"), EOS, *byte_ids("b"), EOS]
        stream, texts, _ = run(ids)
        assert texts == ["a", "a", "ab", "ab"]
        assert stream.text == "ab" and not stream.stopped

    def test_special_tokens_that_are_kept(self):
        ids = [*byte_ids("a"), EOS, *byte_ids("é")]
        stream, texts, _ = run(ids, skip_special_tokens=False)
        assert texts == ["a", "a</s>", "a</s>", "a</s>é"]
        stream, _, taken = run([*ids, EOS], ("s>é",), skip_special_tokens=False)
        assert stream.stopped and stream.text == "a</" and taken == ids

    def test_special_token_inside_a_character(self):
        first, *rest = byte_ids("é")
        stream, texts, _ = run([first, EOS, *rest])
        assert texts == ["", "", "é"] and stream.text == "é"

    def test_nothing(self):
        stream = TextStream(TOKENIZER, ("stop",))
        assert (stream.text, stream.stopped) == ("", False)
        stream.flush()
        assert (stream.text, stream.stopped) == ("", False)

    def test_flushing_twice(self):
        for ids in (byte_ids(b"ab\xf0\x9f"), byte_ids("ab ST")):
            stream, _, _ = run(ids, ("STOP",))
            text = stream.text
            stream.flush()
            assert stream.text == text == TOKENIZER.decode(ids)

    def test_flushing_after_a_stop_leaves_the_cut(self):
        """However far the last token reached beyond the stop string."""
        ids = encode("the quick brown")
        assert TOKENIZER.decode(ids[-1:]).endswith("own")
        stream, _, _ = run(ids, ("b",))
        assert stream.stopped and stream.text == "the quick "
        stream.flush()
        assert stream.stopped and stream.text == "the quick "


class TestStop:
    def test_straddles_tokens(self):
        stream, texts, taken = run(byte_ids("ab STOP cd"), ("STOP",))
        assert texts == ["a", "ab", "ab ", "ab ", "ab ", "ab ", "ab "]
        assert stream.stopped and stream.text == "ab " and len(taken) == 7

    def test_inside_one_token(self):
        token = max(encode("jumps over"), key=lambda i: len(TOKENIZER.decode([i])))
        word = TOKENIZER.decode([token])
        assert len(word) >= 3
        stream, _, taken = run([token] * 2, (word[1:-1],))
        assert stream.stopped and stream.text == word[0] and len(taken) == 1

    def test_is_the_whole_text(self):
        stream, texts, _ = run(byte_ids("STOP"), ("STOP",))
        assert texts == ["", "", "", ""] and stream.text == "" and stream.stopped

    def test_earliest_wins(self):
        for stop in (("fox", "brown"), ("brown", "fox"), ("zzz", "brown", "row")):
            stream, _, _ = run(encode("the quick brown fox"), stop)
            assert stream.text == "the quick "
        # Both in the token that completes them.
        token = max(encode("jumps"), key=lambda i: len(TOKENIZER.decode([i])))
        word = TOKENIZER.decode([token])
        stream, _, _ = run([token], (word[2], word[1]))
        assert stream.text == word[:1]

    def test_what_could_begin_a_stop_is_held(self):
        stream, texts, _ = run(byte_ids("a STAR STOP"), ("STOP", "AR!"))
        assert texts == [
            "a",
            "a ",
            "a ",
            "a ",
            "a ST",  # "STA" begins no stop any more, but "A" does
            "a ST",
            "a STAR ",
            "a STAR ",
            "a STAR ",
            "a STAR ",
            "a STAR ",
        ]
        assert stream.stopped

    def test_overlaps_itself(self):
        stream, texts, _ = run(byte_ids("aababaac"), ("abaac",))
        assert texts == ["", "a", "a", "a", "aab", "aab", "aab", "aab"]
        assert stream.stopped and stream.text == "aab"
        stream, texts, _ = run(byte_ids("\n\n\nx"), ("\n\n",))
        assert texts == ["", ""] and stream.stopped

    def test_what_is_held_is_released_at_the_end(self):
        stream, texts, _ = run(byte_ids("ab STO"), ("STOP",))
        assert texts[-1] == "ab "
        assert stream.text == "ab STO" and not stream.stopped

    def test_of_several_bytes_a_character(self):
        stream, texts, _ = run(byte_ids("x🙂🙃y"), ("🙃",))
        assert stream.text == "x🙂" and stream.stopped
        assert set(texts) == {"x", "x🙂"}

    def test_without_stop_strings_nothing_is_held(self):
        _, texts, _ = run(byte_ids("abc"))
        assert texts == ["a", "ab", "abc"]

    def test_found_in_what_flushing_releases(self):
        stream, texts, _ = run(byte_ids(b"ab\xf0\x9f"), (MARK,))
        assert texts[-1] == "ab"
        assert stream.text == "ab" and stream.stopped


PIECES = st.sampled_from(
    ["a", "b", "ab", "ba", "abc", " ", "\n", "é", "e\u0301", "你", "好", "🙂", "🙃", "the ", "stop"]
)
STRINGS = st.lists(PIECES, min_size=1, max_size=4).map("".join)


@st.composite
def tokens_and_stops(draw):
    """Text in tokens of any length, down to single bytes, and stop strings that are often in it."""
    ids = []
    for text in draw(st.lists(STRINGS, min_size=1, max_size=8)):
        ids += draw(st.sampled_from([encode, byte_ids]))(text)
    text = TOKENIZER.decode(ids)
    start = st.integers(0, len(text) - 1)
    inside = st.builds(lambda at, size: text[at : at + size], start, st.integers(1, 6))
    return ids, tuple(draw(st.lists(st.one_of(STRINGS, inside), max_size=4)))


@given(tokens_and_stops())
@settings(max_examples=300, deadline=None)
@example((byte_ids("abab"), ("abc", "b")))
@example((encode("the end of the tale"), ("e", "tale")))
def test_any_text_and_stop_strings(case):
    ids, stop = case
    stream, texts, taken = run(ids, stop)
    whole = TOKENIZER.decode(taken)
    assert stream.text == first_cut(whole, stop)
    assert stream.stopped == any(s in whole for s in stop)
    assert stream.stopped or taken == ids
    # No token was taken after the one that completed a stop string.
    assert not any(s in certain(taken[:-1]) for s in stop)
    for count, seen in enumerate(texts, start=1):
        assert stream.text.startswith(seen)
        assert MARK not in seen
        if count < len(taken) or not stream.stopped:
            # All that cannot be the beginning of a stop string has been released.
            text = certain(ids[:count])
            held = [at for at in range(len(text)) if any(s.startswith(text[at:]) for s in stop)]
            assert seen == text[: min(held, default=len(text))]


@given(st.lists(st.one_of(st.integers(2, 257), st.integers(0, 329)), max_size=40))
@settings(max_examples=200, deadline=None)
@example([*byte_ids(b"\xe2\x82"), *byte_ids(b"\xe2\x82\xac"), *byte_ids(b"\xff\x80a\xc3")])
def test_any_tokens(ids):
    """What a model writes need not be UTF-8; it is shown as the tokenizer shows the whole."""
    stream, texts, _ = run(ids)
    assert stream.text == TOKENIZER.decode(ids)
    assert all(stream.text.startswith(seen) for seen in texts)


class TestByteFallback:
    """A run of byte tokens is decoded as one: what is not UTF-8 turns all of it into marks."""

    def test_a_run_is_held_back_until_it_ends(self):
        """A later byte could turn what is a character now into a mark."""
        ids = fallback_ids("▁", "▁", "<0x0A>", "<0xC3>", "<0xA9>", "<0x41>", "▁", "<0x0A>")
        stream, texts, _ = run(ids, tokenizer=FALLBACK)
        assert texts == ["", " ", " ", " ", " ", " ", " \néA ", " \néA "]
        assert stream.text == " \néA \n" == FALLBACK.decode(ids)

    def test_character_that_breaks_off_after_a_newline(self):
        ids = fallback_ids("<0x0A>", "<0xF0>", "<0x9F>", "▁")
        stream, texts, _ = run(ids, tokenizer=FALLBACK)
        assert texts == ["", "", "", 3 * MARK + " "]
        stream, _, _ = run(ids[:3], tokenizer=FALLBACK)
        assert stream.text == 3 * MARK

    def test_a_run_that_is_broken_is_held_back_no_longer(self):
        ids = fallback_ids("<0x0A>", "<0xF0>", "<0x0A>", "<0x41>", "▁")
        _, texts, _ = run(ids, tokenizer=FALLBACK)
        assert texts == ["", "", 3 * MARK, 4 * MARK, 4 * MARK + " "]

    @given(st.lists(st.one_of(st.integers(0, 329), st.integers(2, 257)), max_size=30))
    @settings(max_examples=300, deadline=None)
    def test_any_tokens(self, ids):
        stream, texts, _ = run(ids, tokenizer=FALLBACK)
        assert stream.text == FALLBACK.decode(ids)
        assert all(stream.text.startswith(seen) for seen in texts)

    def test_a_stop_string_ends_a_run(self):
        """If no more tokens come, the run is what it is now."""
        stream, _, taken = run(fallback_ids("▁", "a", "<0x0A>", "<0xF0>"), ("\n",), FALLBACK)
        assert stream.stopped and stream.text == "a" and len(taken) == 3

    def test_leading_space(self):
        """Only the very first space of a text is the tokenizer's own."""
        ids = FALLBACK.encode("  the dog").ids
        stream, texts, _ = run(ids, tokenizer=FALLBACK)
        assert stream.text == "  the dog"
        assert all(stream.text.startswith(seen) for seen in texts)

    def test_stop_string(self):
        ids = FALLBACK.encode("the dog\n\nthe fox").ids
        stream, _, _ = run(ids, ("\n\n",), tokenizer=FALLBACK)
        assert stream.text == "the dog" and stream.stopped
