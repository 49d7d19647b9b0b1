# SPDX-License-Identifier: Apache-2.0
"""From tokens back to text as they come: what is certain of a text that still grows."""

import codecs
import copy
import itertools
import json
import re
from collections.abc import Sequence
from typing import Any

import tokenizers
from tokenizers import decoders

MARK = "\N{REPLACEMENT CHARACTER}"

# GPT-2's alphabet: a byte that can be printed is written as itself, the others in order from 256.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_HIDDEN = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTES = {chr(b): b for b in _PRINTABLE} | {chr(256 + i): b for i, b in enumerate(_HIDDEN)}

# Decoders that make one text of one token, which depends on nothing but whether the token is first.
_ONE_BY_ONE = ("Replace", "Strip", "Metaspace", "WordPiece")
# What may follow them: bytes that are spelled as tokens, and what is done to the whole.
_AFTER_THEM = re.compile("(ByteFallback )?((Fuse )+(Strip )?)?")
_UNKNOWN = {"type": "unknown"}
_BYTE_FALLBACK = decoders.ByteFallback()
_CONTEXT = "a"  # a token, to see what another says after it


class Detokenizer:
    """What the tokens of a tokenizer say; many texts can share one.

    Most tokenizers decode in one of two ways. Of byte-level ones (Llama 3, Qwen3) every token is a
    few bytes, and the text is these bytes as UTF-8. Of others every token is a piece of text; some
    of these (Llama 2, Mistral) spell what they have no token for in tokens of one byte, and a run
    of such tokens is text if all of it is UTF-8, and else a replacement mark a byte. A text of a
    tokenizer that decodes in yet another way is decoded when it ends.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        """Reads the tokenizer's decoder and its special tokens, which must not change later.

        Raises:
          ValueError: if it has a decoder that crashes on some texts.
        """
        self._tokenizer = tokenizer
        self._decoder: decoders.Decoder | None = tokenizer.decoder
        self._kind: type[_ByteText | _PieceText | _WholeText] = _WholeText
        # What has been asked for before.
        self._tokens: dict[int, str | None] = {}
        self._pieces: dict[str, str | int] = {}
        self._bytes: dict[str, bytes] = {}
        # What is stripped from the beginning of a text: which character, how often at most.
        self.strip_char: str = ""
        self.max_strips: int = 0
        steps = _steps(self._decoder)
        if any(step["type"] == "Strip" and step["stop"] for step in steps):
            # tokenizers panics where a text is shorter than that.
            raise ValueError("its decoder strips the end of texts (Strip with stop above 0)")
        self._special = _special_tokens(tokenizer, known=_UNKNOWN not in steps)
        one_by_one = list(itertools.takewhile(lambda step: step["type"] in _ONE_BY_ONE, steps))
        after = "".join(f"{step['type']} " for step in steps[len(one_by_one) :])
        if re.fullmatch("ByteLevel (Fuse )*", after) and not one_by_one:
            self._kind = _ByteText
        elif _AFTER_THEM.fullmatch(after):
            self._kind = _PieceText
            self._has_bytes = "ByteFallback" in after
            self._one_by_one = _sequence(one_by_one) if self._decoder else None
            self._context = _decode(self._one_by_one, [_CONTEXT])
            if "Strip" in after:
                self.strip_char, self.max_strips = steps[-1]["content"], steps[-1]["start"]

    def begin(self, prompt_token_ids: Sequence[int], *, skip_special_tokens: bool) -> "GrowingText":
        """Returns an empty text that follows a prompt."""
        return self._kind(self, prompt_token_ids, skip_special_tokens)

    def token(self, token_id: int, *, skip_special_tokens: bool) -> str | None:
        """The token as the vocabulary has it; None if it is unknown, or special and skipped."""
        token = self._token(token_id)
        return None if skip_special_tokens and token in self._special else token

    def special(self, token_id: int) -> str | None:
        """What a special token is written as; None for another."""
        token = self._token(token_id)
        return token if token in self._special else None

    def bytes_of(self, token: str) -> bytes:
        """The bytes of a byte-level token."""
        if token not in self._bytes:
            try:
                self._bytes[token] = bytes(_BYTES[char] for char in token)
            except KeyError:  # an added token
                self._bytes[token] = token.encode()
        return self._bytes[token]

    def piece(self, token: str, *, first: bool) -> str | int:
        """The piece of text that a token is, or the byte; `first` if no token is before it."""
        if first:
            return self._read(_decode(self._one_by_one, [token]))
        if token not in self._pieces:
            both = _decode(self._one_by_one, [_CONTEXT, token])
            self._pieces[token] = self._read(both[len(self._context) :])
        return self._pieces[token]

    def _read(self, piece: str) -> str | int:
        # The library says what it takes for a byte; "<0x+A>" is one.
        if not self._has_bytes or _BYTE_FALLBACK.decode([piece]) == piece:
            return piece
        return int(piece[3:5], 16)

    def _token(self, token_id: int) -> str | None:
        try:
            return self._tokens[token_id]
        except KeyError:
            token = self._tokens[token_id] = self._tokenizer.id_to_token(token_id)
            return token

    def decode(self, tokens: list[str]) -> str:
        """What the decoder makes of them all."""
        return _decode(self._decoder, tokens)


class GrowingText:
    """The text that tokens add to a prompt.

    The text is what prompt and tokens together decode to, less what they have in common with what
    the prompt decodes to, from the beginning. That matters where the prompt ends inside a
    character, which the prompt alone shows as replacement marks: the text then begins with the
    completed character, or, if it is not completed, behind the mark.
    """

    def __init__(self, detokenizer: Detokenizer, skip_special_tokens: bool):
        self._detokenizer = detokenizer
        self._skip = skip_special_tokens
        # What of the prompt's text is not certain, and not passed yet.
        self._prompt_tail = ""

    @property
    def inside_character(self) -> bool:
        """Whether the last token ends inside a character, or might, so that `tail` has marks."""
        raise NotImplementedError

    def copy(self) -> "GrowingText":
        """A text that goes on from here by itself."""
        return copy.copy(self)

    def add(self, token_id: int) -> str:
        """Adds a token. Returns: what has become certain."""
        token = self._token(token_id)
        if token is None:
            return ""
        text = self._add(token)
        if self._prompt_tail:
            text, self._prompt_tail = _less(text, self._prompt_tail)
        return text

    def tail(self) -> str:
        """What would follow if no more tokens came."""
        return _less(self._tail(), self._prompt_tail)[0]

    def close(self) -> str:
        """Ends the text. Returns: what follows."""
        tail = self.tail()
        self._prompt_tail = ""
        self._drop_tail()
        return tail

    def _token(self, token_id: int) -> str | None:
        return self._detokenizer.token(token_id, skip_special_tokens=self._skip)

    def _add(self, token: str) -> str:
        raise NotImplementedError

    def _tail(self) -> str:
        raise NotImplementedError

    def _drop_tail(self) -> None:
        raise NotImplementedError


class _ByteText(GrowingText):
    """Of a byte-level tokenizer."""

    def __init__(self, detokenizer: Detokenizer, prompt: Sequence[int], skip_special_tokens: bool):
        super().__init__(detokenizer, skip_special_tokens)
        self._incomplete = b""
        end = b""
        for token_id in reversed(prompt):
            if (token := self._token(token_id)) is not None:
                end = detokenizer.bytes_of(token) + end
            if len(end) >= 3:  # an incomplete character has no more
                break
        self._decode(end)
        self._prompt_tail = self._tail()

    @property
    def inside_character(self) -> bool:
        return bool(self._incomplete)

    def _add(self, token: str) -> str:
        return self._decode(self._detokenizer.bytes_of(token))

    def _decode(self, more: bytes) -> str:
        # As Rust and Unicode have it: a mark for each longest beginning of a character.
        data = self._incomplete + more if self._incomplete else more
        text, num_read = codecs.utf_8_decode(data, "replace", False)
        self._incomplete = data[num_read:]
        return text

    def _tail(self) -> str:
        return self._incomplete.decode("utf-8", "replace")

    def _drop_tail(self) -> None:
        self._incomplete = b""


class _PieceText(GrowingText):
    """Of a tokenizer whose tokens are pieces of text, or single bytes."""

    def __init__(self, detokenizer: Detokenizer, prompt: Sequence[int], skip_special_tokens: bool):
        super().__init__(detokenizer, skip_special_tokens)
        self._first = True
        self._num_strips = detokenizer.max_strips
        self._end_run()
        # Of the prompt its beginning matters, while something is stripped, and its last bytes.
        known = (place for place, i in enumerate(prompt) if self._token(i) is not None)
        first, start = next(known, 0), len(prompt)
        while start and self._is_in_run(prompt[start - 1], first=start - 1 == first):
            start -= 1
        for token_id in itertools.islice(prompt, start):
            self.add(token_id)
            if not self._first and not self._num_strips:
                break
        self._end_run()
        for token_id in itertools.islice(prompt, start, None):
            self.add(token_id)
        self._prompt_tail = self._tail()

    @property
    def inside_character(self) -> bool:
        return bool(self._incomplete)

    def _is_in_run(self, token_id: int, *, first: bool) -> bool:
        """Whether a token is a byte, or none at all, which ends no run."""
        token = self._token(token_id)
        return token is None or isinstance(self._detokenizer.piece(token, first=first), int)

    def _add(self, token: str) -> str:
        first, self._first = self._first, False
        piece = self._detokenizer.piece(token, first=first)
        if isinstance(piece, str):
            text, self._num_strips = self._strip(self._run() + piece)
            self._end_run()
            return text
        if self._broken:
            text, self._num_strips = self._strip(MARK)
            return text
        self._num_bytes += 1
        data = self._incomplete + bytes([piece])
        try:
            text, num_read = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError:
            # Whatever follows, the run is no text any more.
            text, self._num_strips = self._strip(MARK * self._num_bytes)
            self._end_run()
            self._broken = True
            return text
        self._incomplete = data[num_read:]
        self._run_text += text
        return ""

    def _tail(self) -> str:
        return self._strip(self._run())[0]

    def _drop_tail(self) -> None:
        self._num_strips = self._strip(self._run())[1]
        self._end_run()

    def _run(self) -> str:
        """What the open run of bytes is if it ends here."""
        return MARK * self._num_bytes if self._incomplete else self._run_text

    def _end_run(self) -> None:
        """No run of bytes is open."""
        self._num_bytes = 0
        self._run_text = ""  # of its complete characters, while all of it is UTF-8
        self._incomplete = b""
        self._broken = False

    def _strip(self, text: str) -> tuple[str, int]:
        """Strips the beginning of the whole. Returns: the rest, and how often it may go on."""
        left = self._num_strips
        if not left:
            return text, 0
        while left and text.startswith(self._detokenizer.strip_char):
            text, left = text[1:], left - 1
        return text, 0 if text else left


class _WholeText(GrowingText):
    """Of a tokenizer of another kind: nothing is certain before the end."""

    def __init__(self, detokenizer: Detokenizer, prompt: Sequence[int], skip_special_tokens: bool):
        super().__init__(detokenizer, skip_special_tokens)
        self._tokens = [token for i in prompt if (token := self._token(i)) is not None]
        self._prompt_tail = self._tail()

    @property
    def inside_character(self) -> bool:
        return True

    def copy(self) -> "_WholeText":
        twin = copy.copy(self)
        twin._tokens = list(self._tokens)
        return twin

    def _add(self, token: str) -> str:
        self._tokens.append(token)
        return ""

    def _tail(self) -> str:
        return self._detokenizer.decode(self._tokens)

    def _drop_tail(self) -> None:
        self._tokens = []


def _less(text: str, known: str) -> tuple[str, str]:
    """Takes off what two texts have in common. Returns: what is left of the first and the second.

    Of the second nothing is left once the first differs.
    """
    pairs = enumerate(zip(text, known, strict=False))
    same = next((i for i, (a, b) in pairs if a != b), min(len(text), len(known)))
    return text[same:], known[same:] if same == len(text) else ""


def _decode(decoder: decoders.Decoder | None, tokens: list[str]) -> str:
    return " ".join(tokens) if decoder is None else decoder.decode(tokens)


def _special_tokens(tokenizer: tokenizers.Tokenizer, *, known: bool) -> frozenset[str]:
    """Those that decoding skips; `known` if its decoder is one of the library's own."""

    def is_skipped(i: int) -> bool:
        # A special token that was added again as another stays one.
        return known and tokenizer.decode([i, i]) != tokenizer.decode([i, i], False)

    added = tokenizer.get_added_tokens_decoder()
    return frozenset(t.content for i, t in added.items() if t.special or is_skipped(i))


def _sequence(steps: list[dict[str, Any]]) -> decoders.Decoder:
    decoder = decoders.Fuse()
    decoder.__setstate__(json.dumps({"type": "Sequence", "decoders": steps}).encode())
    return decoder


def _steps(decoder: decoders.Decoder | None) -> list[dict[str, Any]]:
    """What a decoder does, one thing after the other."""
    if decoder is None:
        return []
    try:
        steps = [json.loads(decoder.__getstate__())]
    except Exception:  # written in Python; tokenizers raises bare Exception
        return [_UNKNOWN]
    while any(step["type"] == "Sequence" for step in steps):
        steps = [s for step in steps for s in step.get("decoders", [step])]
    return steps
