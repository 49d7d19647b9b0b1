# SPDX-License-Identifier: Apache-2.0
"""From text to tokens, and from tokens back to text as they come."""

import copy
import json
import pathlib
from collections.abc import Sequence

import tokenizers

from jpaged.detokenizer import Detokenizer
from jpaged.host.checks import shown
from jpaged.models.paths import is_address, is_there


def load_tokenizer(directory: pathlib.Path) -> tokenizers.Tokenizer | None:
    """Reads `tokenizer.json`; None where the directory has none.

    Raises:
      ValueError: if the file is there but cannot be read, or is no tokenizer that can be used; the
        message is one line and names the file.
    """
    path = directory / "tokenizer.json"
    if not is_there(path):
        return None
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no regular file")
        if is_address(path):
            return checked_tokenizer(tokenizers.Tokenizer.from_buffer(path.read_bytes()))
        return checked_tokenizer(tokenizers.Tokenizer.from_file(str(path)))
    except BaseException as e:
        if not is_fault(e):
            raise
        reason = " ".join(str(e).split())
        raise ValueError(f"{path} is not a readable tokenizer: {reason:.300}") from e


def checked_tokenizer(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Returns a tokenizer, held to what is asked of one.

    Raises:
      ValueError: if it would fail later.
    """
    # What a tokenizer was saved with for training must not cut or pad prompts in silence.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _check_template(tokenizer)
    Detokenizer(tokenizer)
    return tokenizer


def encode(
    tokenizer: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = True
) -> list[int]:
    """Returns a text's token ids.

    Args:
      tokenizer: whose.
      text: Unicode, without halves of surrogate pairs.
      add_special_tokens: whether the tokenizer adds those that it adds to a text, such as a first
        one; those that stand in the text are found in any case.

    Raises:
      ValueError: if it cannot be encoded.
    """
    try:
        return tokenizer.encode(str.__str__(text), add_special_tokens=add_special_tokens).ids
    except BaseException as e:
        if not is_fault(e):
            raise
        raise ValueError(
            f"the tokenizer cannot encode prompt={shown(text)}: {shown(str(e))}"
        ) from e


def is_fault(error: BaseException) -> bool:
    """Whether something went wrong, as opposed to an interrupt.

    tokenizers raises bare Exception, and where Rust panics a class that is none of it.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _check_template(tokenizer: tokenizers.Tokenizer) -> None:
    """Raises ValueError if encoding would name a special token that the file does not explain.

    tokenizers finds that out with the first prompt, and panics.
    """
    if tokenizer.post_processor is None:
        return
    processors = [json.loads(tokenizer.post_processor.__getstate__())]
    while processors:
        processor = processors.pop()
        processors += processor.get("processors", [])
        used = [p["SpecialToken"]["id"] for p in processor.get("single", ()) if "SpecialToken" in p]
        if unknown := sorted(set(used) - set(processor.get("special_tokens", used))):
            raise ValueError(f"post_processor.special_tokens has no {unknown[0]!r}")


class TextStream:
    """One sample's text, decoded token by token, until a stop string ends it.

    The text is what `Tokenizer.decode` makes of prompt and tokens together, less the prompt's (see
    `GrowingText`), up to the first stop string. It only grows: what could still change is held
    back, that is bytes of a character that is not complete, bytes of a run that a later one could
    break (see `Detokenizer`), and an end that could be the beginning of a stop string.

    A stop string that has a special token in it is also found where special tokens are skipped.

    Attributes:
      text: what is certain.
      stopped: whether a stop string has ended it.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer | Detokenizer,
        stop: Sequence[str],
        prompt_token_ids: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
    ):
        """Begins behind a prompt.

        Args:
          tokenizer: of the tokens; or its detokenizer, which streams can share.
          stop: strings that end the text, and are cut from it.
          prompt_token_ids: what is before the tokens to come.
          skip_special_tokens: whether special tokens are no text.
        """
        if isinstance(tokenizer, tokenizers.Tokenizer):
            tokenizer = Detokenizer(tokenizer)
        self.text = ""
        self.stopped = False
        self._detokenizer = tokenizer
        self._skip = skip_special_tokens
        self._growing = tokenizer.begin(prompt_token_ids, skip_special_tokens=skip_special_tokens)
        self._certain = ""
        self._stop = stop
        self._longest_stop = max(map(len, stop), default=0)
        self._begun: list[_BegunStop] = []

    def copy(self, stop: Sequence[str]) -> "TextStream":
        """A stream that goes on from here by itself, with stop strings of its own."""
        twin = copy.copy(self)
        twin._growing = self._growing.copy()
        twin._stop, twin._longest_stop = stop, max(map(len, stop), default=0)
        twin._begun = []
        return twin

    def add(self, token_id: int) -> None:
        """Adds a token; the text is cut before a stop string that it completes."""
        if self._skip and self._stop:
            special = self._detokenizer.special(token_id)
            if special is not None:
                self._meet_special(special)
                return
        piece = self._growing.add(token_id)
        # What is not certain is the text if this is the end: a stop string in it makes it that.
        known = "" if not self._stop or self._growing.inside_character else self._growing.tail()
        self._release(piece, known)

    def flush(self) -> None:
        """Releases what was held back, when no more tokens come."""
        if self.stopped:
            return
        # An incomplete character at the very end stays a replacement mark.
        self._release(self._growing.close(), "")
        if not self.stopped:
            self.text = self._certain

    def _release(self, piece: str, tail: str) -> None:
        """Adds what has become certain, and looks for stop strings in it and in what follows."""
        if not self._stop:
            self._certain += piece
            self.text = self._certain
            return
        # A stop string may straddle tokens, but cannot begin before text that was searched whole.
        search_from = max(len(self._certain) - self._longest_stop + 1, 0)
        self._certain += piece
        whole = self._certain + tail
        cuts = [at for stop in self._stop if (at := whole.find(stop, search_from)) >= 0]
        if self._begun:
            self._begun = [begun for begun in self._begun if begun.go_on(whole)]
            cuts += [begun.cut for begun in self._begun if not begun.rest]
        self._cut(whole, cuts)

    def _meet_special(self, special: str) -> None:
        """Looks for stop strings that have a special token in them, which is no text itself."""
        if not self._begun and not any(special in stop for stop in self._stop):
            return  # at no cost: a tail may be all of the text
        whole = self._certain + self._growing.tail()
        self._begun = [begun for begun in self._begun if begun.go_on_with(special)]
        for stop in self._stop:
            before, found, after = stop.partition(special)
            if found and whole.endswith(before):
                self._begun.append(_BegunStop(whole, len(whole) - len(before), after))
        self._cut(whole, [begun.cut for begun in self._begun if not begun.rest])

    def _cut(self, whole: str, cuts: list[int]) -> None:
        if cuts:
            self.text = whole[: min(cuts)]
            self.stopped = True
            return
        held = max((_overlap(self._certain, stop) for stop in self._stop), default=0)
        ends = [begun.cut for begun in self._begun]
        self.text = self._certain[: min([len(self._certain) - held, *ends])]


class _BegunStop:
    """A stop string of which a special token was met that is no text.

    Attributes:
      cut: where the text ends if the rest follows.
      rest: what is still to follow.
    """

    def __init__(self, text: str, cut: int, rest: str):
        self.cut, self.rest = cut, rest
        self._text = text

    def go_on(self, text: str) -> bool:
        """Takes what the text has become. Returns: whether this can still be the stop string."""
        if len(text) < len(self._text):
            return self._text.startswith(text)  # an incomplete character has begun
        if not text.startswith(self._text):
            return False
        more = text[len(self._text) :]
        self._text = text
        return self._take(more)

    def go_on_with(self, special: str) -> bool:
        """Takes another special token. Returns: as `go_on` does."""
        return self._take(special)

    def _take(self, more: str) -> bool:
        fits = self.rest.startswith(more) or more.startswith(self.rest)
        self.rest = self.rest[len(more) :]
        return fits


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`, and is shorter than it."""
    start = max(len(text) - len(stop) + 1, 0)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0
