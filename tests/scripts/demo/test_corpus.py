# SPDX-License-Identifier: Apache-2.0
import itertools
import re
from collections import Counter

import pytest

from jpaged.scripts.demo.corpus import stories
from jpaged.scripts.demo.tokenizer import BOS, EOS, train_tokenizer

_NUM_STORIES = 2000


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(itertools.islice(stories(0), _NUM_STORIES))


@pytest.fixture(scope="module")
def sentences(corpus: list[str]) -> list[str]:
    """Sentences of running text, without headings, verses and the lines of letters and lists."""
    paragraphs = (line for text in corpus for line in text.split("\n") if line.count(". ") > 1)
    return [s for paragraph in paragraphs for s in re.split(r"(?<=[.!?])\"? (?=[A-Z])", paragraph)]


@pytest.fixture(scope="module")
def tokenizer(corpus: list[str]):
    return train_tokenizer(corpus[:500], vocab_size=1024)


def test_equal_seeds_give_equal_stories(corpus):
    assert list(itertools.islice(stories(0), 50)) == corpus[:50]


def test_another_seed_gives_other_stories(corpus):
    others = itertools.islice(stories(1), _NUM_STORIES)
    assert sum(text in corpus for text in others) < 0.1 * _NUM_STORIES


@pytest.mark.parametrize(
    "mistake",
    [
        r"\b[Aa] (?!one\b|once|use|usual|uni)[aeiouAEIOU]\w*",
        r"\b[Aa]n (?!hour|honest)[^aeiouAEIOU\W]\w*",
        r"\b(\w+) \1\b(?<!that that)",  # "the the"
        r"[\[\]{}|]|  |\n\n\n| [.,!?]",  # template notation and untidy space
        r"[.!?] [a-z]",  # a sentence without its capital
        r"(?<![\w'])(?:to|of|with|for|at|gave|asked|and they) I\b",
        r"\bI (?:is|are|has)\b|\b[Ss]?[Hh]e (?:are|have|were)\b|\b[Tt]hey (?:was|is|has)\b",
    ],
)
def test_has_no(mistake, corpus):
    assert [m[0] for text in corpus for m in re.finditer(mistake, text)] == []


def test_paragraphs_end_with_punctuation(corpus):
    headings = re.compile(
        r"How to .*|(?:My d|D)ear .*|Your friend, \w+|.* your \w+|With love .*|Yours, \w+"
    )
    last_lines = [text.rstrip().split("\n")[-1] for text in corpus]
    assert [
        line for line in last_lines if not headings.fullmatch(line) and line[-1] not in '.!?"'
    ] == []


def test_quotation_marks_are_paired(corpus):
    lines = [line for text in corpus for line in text.split("\n")]
    assert [line for line in lines if line.count('"') % 2] == []


def test_sentences_and_words_are_diverse(corpus, sentences):
    words = Counter(re.findall(r"[a-z]+", " ".join(corpus).lower()))
    assert len(words) > 1500
    # A sentence's shape: its frequent words, with every rarer word left blank.
    frequent = {word for word, _ in words.most_common(150)}
    shapes = {
        " ".join(w if w in frequent else "_" for w in re.findall(r"[a-z]+", s.lower()))
        for s in sentences
    }
    assert len(shapes) > 3000
    assert len(set(corpus)) > 0.9 * _NUM_STORIES


def test_special_tokens_come_first_and_bos_is_prepended(tokenizer):
    assert (tokenizer.token_to_id(BOS), tokenizer.token_to_id(EOS)) == (0, 1)
    assert tokenizer.get_vocab_size() == 1024
    ids = tokenizer.encode("Once upon a time").ids
    assert ids[0] == 0
    assert 0 not in ids[1:]


@pytest.mark.parametrize(
    "text", ["", "naïve café", "日本語", "🙂", "a\tb\r\n", "\x00", " double  "]
)
def test_every_text_survives_the_tokenizer(text, tokenizer):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
