# SPDX-License-Identifier: Apache-2.0
"""The tokens of jobs by definition: from lists alone, without pages, steps or neighbours."""

import dataclasses
import functools
import zlib


@dataclasses.dataclass(frozen=True)
class Job:
    """A request to simulate.

    Attributes:
      stops: per sample, after how many tokens it draws its stop token, or None.
      aborted_at: the step before which the caller gives up, or None.
      family: jobs of one family have the same prompts, as far as these go.
      beam_width: searches with beams instead of drawing samples.
      early_stopping, length_penalty: of the search.
      priority: as in `SamplingParams`; no token depends on it.
    """

    prompt_len: int
    max_tokens: int
    n: int = 1
    arrival: int = 0
    stops: tuple[int | None, ...] = ()
    aborted_at: int | None = None
    family: int = 0
    beam_width: int | None = None
    early_stopping: bool | str = False
    length_penalty: float = 1.0
    priority: int = 0


def first_seen(window, position):
    """The first position that a query at a position sees: itself and `window - 1` before it."""
    return 0 if window is None else max(0, position - (window - 1))


def prompt_of(key):
    family, length = key
    return [1000 * (family + 1) + i for i in range(length)]


BEAM_VOCABULARY = range(1, 7)
BEAM_STOP = 1


def logprob(context, token):
    """The fake model of beam search."""
    return -5 * zlib.crc32(repr((context, token)).encode()) / 2**32


def continuations(beams):
    """All of (score, beam, token), best first, for the contexts and scores of beams."""
    return sorted(
        (
            (score + logprob(context, token), beam, token)
            for beam, (context, score) in enumerate(beams)
            for token in BEAM_VOCABULARY
        ),
        key=lambda candidate: (-candidate[0], *candidate[1:]),
    )


@functools.lru_cache(maxsize=4096)
def expected_beams(key, length, width, early_stopping, penalty):
    """Hypotheses of a beam search, best first: transformers' rules, over copied lists."""
    prompt = prompt_of(key)
    beams, ended = [(prompt, 0.0)], []
    while True:
        size = len(beams[0][0]) + 1 - len(prompt)
        best = [
            (beams[beam][0] + [token], score)
            for score, beam, token in continuations(beams)[: 2 * width]
        ]
        done = [t[-1] == BEAM_STOP or len(t) == length for t, _ in best]
        if not (len(ended) == width and early_stopping is True):
            new = [
                (score / size**penalty, tokens)
                for (tokens, score), is_done in zip(best[:width], done, strict=False)
                if is_done
            ]
            ended = sorted(ended + new, key=lambda h: -h[0])[:width]
        beams = [beam for beam, is_done in zip(best, done, strict=True) if not is_done][:width]
        if not beams:
            break
        if len(ended) == width:
            longest = length - len(prompt)
            reach = longest if early_stopping == "never" and penalty > 0 else size
            if early_stopping is True or beams[0][1] / reach**penalty <= ended[-1][0]:
                break
    return [(score, tokens[len(prompt) :]) for score, tokens in ended]


def draw(sample_index, context):
    """The fake model: the token that follows `context` in a sample."""
    return 10**6 + zlib.crc32(repr((sample_index, context)).encode())


@functools.lru_cache(maxsize=4096)
def expected_tokens(key, sample_index, length):
    """Prompt and generated tokens of a sample, `length` in all, by definition."""
    tokens = prompt_of(key)
    while len(tokens) < length:
        tokens.append(draw(sample_index, tokens))
    return tokens
