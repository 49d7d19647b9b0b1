# SPDX-License-Identifier: Apache-2.0
"""From text to tokens, and from tokens back to text as they come."""

import pathlib
from collections.abc import Sequence

import tokenizers
import tokenizers.decoders


def load_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer | None:
    """Reads `tokenizer.json`; None where the directory has none.

    Raises:
      ValueError: if the file is there but cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.exists():
        return None
    try:
        return tokenizers.Tokenizer.from_file(str(path))
    except Exception as e:  # tokenizers raises bare Exception
        raise ValueError(f"{path} is not a readable tokenizer: {e}") from e


class TextStream:
    """One sample's text, decoded token by token, until a stop string ends it.

    Text is held back while it could still change: bytes of a character that is not complete, and an
    end that could be the beginning of a stop string.

    Attributes:
      text: what is certain.
      stopped: whether a stop string has ended it.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Sequence[str]):
        self.text = ""
        self.stopped = False
        self._tokenizer = tokenizer
        self._stop = stop
        self._decoder = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        self._token_ids: list[int] = []
        self._decoded = ""  # all that the decoder has released
        self._longest_stop = max(map(len, stop), default=0)

    def add(self, token_id: int) -> None:
        """Adds a token; the text is cut before a stop string that it completes."""
        self._token_ids.append(token_id)
        if piece := self._decoder.step(self._tokenizer, token_id):
            self._release(piece)

    def flush(self) -> None:
        """Releases what was held back, when no more tokens come."""
        if self.stopped:
            return
        whole = self._tokenizer.decode(self._token_ids, skip_special_tokens=True)
        # An incomplete character at the very end decodes to a replacement mark: show it.
        rest = whole[len(self._decoded) :] if whole.startswith(self._decoded) else ""
        self._release(rest)
        if not self.stopped:
            self.text = self._decoded

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
