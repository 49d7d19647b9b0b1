# SPDX-License-Identifier: Apache-2.0
"""From text to tokens, and from tokens back to text as they come."""

import copy
import pathlib
from collections.abc import Sequence

import tokenizers


def load_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer | None:
    """Reads `tokenizer.json`; None where the directory has none.

    Raises:
      ValueError: if the file is there but cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer: {e}") from e
    # What a tokenizer was saved with for training must not cut or pad prompts in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


class TextStream:
    """One sample's text, decoded token by token, until a stop string ends it.

    Text is held back while it could still change: bytes of a character that is not complete, and an
    end that could be the beginning of a stop string.

    Attributes:
      text: what is certain.
      stopped: whether a stop string has ended it.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        stop: Sequence[str],
        prompt_token_ids: Sequence[int] = (),
    ):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        # Some tokenizers drop the space before the first token that they decode: let that be one of
        # the prompt's.
        self._token_ids = list(prompt_token_ids[-4:])
        # Tokens before `_read` are in `_decoded`. Decoding starts a little earlier, at `_prefix`,
        # because what a token says can depend on the one before it (a space, for instance).
        self._prefix = 0
        self._read = len(self._token_ids)
        self._decoded = ""
        self._longest_stop = max(map(len, stop), default=0)

    def copy(self, stop: Sequence[str]) -> "TextStream":
        """A stream that goes on from here by itself, with stop strings of its own."""
        twin = copy.copy(self)
        twin._token_ids = list(self._token_ids)
        twin._stop, twin._longest_stop = stop, max(map(len, stop), default=0)
        return twin

    def add(self, token_id: int) -> None:
        """Adds a token; the text is cut before a stop string that it completes."""
        self._token_ids.append(token_id)
        known = self._decode(self._prefix, self._read)
        text = self._decode(self._prefix, len(self._token_ids))
        # A replacement mark at the end is a character whose bytes are still to come.
        if len(text) > len(known) and not text.endswith("\ufffd"):
            self._prefix, self._read = self._read, len(self._token_ids)
            self._release(text[len(known) :])

    def flush(self) -> None:
        """Releases what was held back, when no more tokens come."""
        if self.stopped:
            return
        known = self._decode(self._prefix, self._read)
        # An incomplete character at the very end stays a replacement mark.
        rest = self._decode(self._prefix, len(self._token_ids))[len(known) :]
        self._prefix = self._read = len(self._token_ids)
        self._release(rest)
        if not self.stopped:
            self.text = self._decoded

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:end], skip_special_tokens=True)

    def _release(self, piece: str) -> None:
        # A stop string may straddle tokens, but cannot begin before text that was searched whole.
        search_from = max(len(self._decoded) - self._longest_stop + 1, 0)
        self._decoded += piece
        found = [at for stop in self._stop if (at := self._decoded.find(stop, search_from)) >= 0]
        if found:
            self.text = self._decoded[: min(found)]
            self.stopped = True
            return
        held = max((_overlap(self._decoded, stop) for stop in self._stop), default=0)
        self.text = self._decoded[: len(self._decoded) - held]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
