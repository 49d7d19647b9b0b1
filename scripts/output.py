# SPDX-License-Identifier: Apache-2.0
"""Where results go: standard output, each as it comes, as text or as JSON."""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from typing import Any, TextIO

import tokenizers
import tqdm

from jpaged import RequestOutput
from jpaged.host.outputs import Completion
from jpaged.scripts.flags import OutputError

_MARK = "\N{REPLACEMENT CHARACTER}"


class ResultWriter:
    """Writes results, each at once and whole, and remembers of them what the end needs.

    What the stream's encoding lacks is escaped: in text as Python does it (`backslashreplace`), in
    JSON as JSON does it. Numbers that are not finite become null, as JSON has no others.

    Attributes:
      num_finished, num_aborted, num_errors: requests by how they ended.
      written: indices of the prompts that have been counted.
      first_token_s: their times to the first token.
    """

    def __init__(
        self,
        prompts: Sequence[str | list[int]],
        tokenizer: tokenizers.Tokenizer | None,
        *,
        as_json: bool,
        stream: TextIO | None = None,
    ):
        """Remembers what the results belong to.

        Args:
          prompts: of the run, in order.
          tokenizer: of the model; without one, token ids are written as text.
          as_json: one object a request, one a line, instead of text.
          stream: where to write; None takes standard output.
        """
        self.num_finished = self.num_aborted = self.num_errors = 0
        self.written: set[int] = set()
        self.first_token_s: list[float] = []
        self._prompts, self._tokenizer, self._as_json = prompts, tokenizer, as_json
        self._stream: Any = sys.stdout if stream is None else stream
        self._stream.reconfigure(errors="backslashreplace")
        encoding = (self._stream.encoding or "ascii").lower().replace("_", "-")
        self._escape = not encoding.startswith("utf")

    def write(self, index: int, output: RequestOutput) -> None:
        """Writes the result of a prompt."""
        if self._as_json:
            fields = dataclasses.asdict(dataclasses.replace(output, request_id=str(index)))
            # Ctrl-C has ended it, which is not what others call finished.
            fields["finished"] = output.finished and not _is_aborted(output)
            text = _json(fields, self._escape) + "\n"
        else:
            text = "".join(self._sample(index, c, i) for i, c in enumerate(output.outputs))
        # Counted before: what Ctrl-C interrupts is in the stream's buffer, and is written later.
        self.count(index, output)
        self.text(text)

    def write_sample(self, index: int, completion: Completion, sample: int) -> None:
        """Writes one of a prompt's samples, as text."""
        self.text(self._sample(index, completion, sample))

    def write_logprobs(self, completion: Completion) -> None:
        """Writes each token with its log-probability and the likeliest tokens, a line a token."""
        self.text(self._logprobs(completion))

    def count(self, index: int, output: RequestOutput | None) -> None:
        """Counts a request by how it ended; None for one that came to nothing."""
        self.written.add(index)
        errors = {c.error for c in output.outputs if c.error is not None} if output else set()
        for error in sorted(errors):
            print(f"prompt {index + 1}: {' '.join(error.split())}", file=sys.stderr)
        if errors:
            self.num_errors += 1
        elif output is None or _is_aborted(output):
            self.num_aborted += 1
        else:
            self.num_finished += 1
        if output is not None and output.time_to_first_token_s is not None:
            self.first_token_s.append(output.time_to_first_token_s)

    def text(self, text: str) -> None:
        """Writes text, to its reader.

        Raises:
          BrokenPipeError: if nobody reads.
          OutputError: if it cannot be written for another reason.
        """
        try:
            # A progress bar on the same terminal makes room.
            with tqdm.tqdm.external_write_mode(file=self._stream):
                self._stream.write(text)
                self._stream.flush()
        except BrokenPipeError:
            raise
        except OSError as e:
            raise OutputError(e.strerror or str(e)) from e

    def prompt_text(self, index: int) -> str:
        """A prompt as it is shown."""
        prompt = self._prompts[index]
        return prompt if isinstance(prompt, str) else " ".join(map(str, prompt))

    def completion_text(self, completion: Completion) -> str:
        """A sample as it is shown behind its prompt."""
        if self._tokenizer is not None:
            return completion.text
        return "".join(f" {token}" for token in completion.token_ids)

    def _sample(self, index: int, completion: Completion, sample: int) -> str:
        if not completion.token_ids:  # it was never begun
            return ""
        aborted = " (aborted)" if completion.finish_reason in (None, "abort") else ""
        text = self.prompt_text(index) + self.completion_text(completion)
        head = f"=== prompt {index + 1}, sample {sample + 1}{aborted}\n"
        return f"{head}{text}\n\n{self._logprobs(completion)}"

    def _logprobs(self, completion: Completion) -> str:
        if not completion.logprobs:
            return ""
        pairs = zip(completion.token_ids, completion.logprobs, strict=True)
        return "".join(f"{self._logprob_line(*pair)}\n" for pair in pairs) + "\n"

    def _logprob_line(self, token: int, logprobs: dict[int, float]) -> str:
        others = "  ".join(f"{value:.4f} {self._name(i)}" for i, value in logprobs.items())
        return f"{logprobs.get(token, math.nan):9.4f} {self._name(token)}  of  {others}"

    def _name(self, token: int) -> str:
        if self._tokenizer is None:
            return str(token)
        text = self._tokenizer.decode([token], skip_special_tokens=False)
        if not text or _MARK in text:  # a part of a character
            text = self._tokenizer.id_to_token(token) or str(token)
        return json.dumps(text, ensure_ascii=False)


class GrowingSample:
    """Writes the one sample of the first prompt as it grows."""

    def __init__(self, writer: ResultWriter):
        """Writes the prompt."""
        self._writer, self._shown = writer, 0
        writer.text(writer.prompt_text(0))

    def grow(self, output: RequestOutput) -> None:
        """Writes what has come since."""
        text = self._writer.completion_text(output.outputs[0])
        self._writer.text(text[self._shown :])
        self._shown = len(text)

    def end(self, output: RequestOutput | None) -> None:
        """Writes what comes at the end; None if nothing has come."""
        self._writer.text("\n")
        if output is not None:
            self._writer.write_logprobs(output.outputs[0])


class EndingSamples:
    """Writes each sample of the first prompt when it has ended."""

    def __init__(self, writer: ResultWriter):
        """Writes nothing yet."""
        self._writer = writer
        self._shown: set[int] = set()

    def grow(self, output: RequestOutput) -> None:
        """Writes those that have ended since."""
        for index, completion in enumerate(output.outputs):
            if completion.finish_reason is not None:
                self._write(index, completion)

    def end(self, output: RequestOutput | None) -> None:
        """Writes the others, as far as they came; None if nothing has come."""
        for index, completion in enumerate(output.outputs if output else ()):
            self._write(index, completion)

    def _write(self, index: int, completion: Completion) -> None:
        if index not in self._shown:
            self._shown.add(index)
            self._writer.write_sample(0, completion, index)


def _is_aborted(output: RequestOutput) -> bool:
    return not output.outputs or any(c.finish_reason in (None, "abort") for c in output.outputs)


def _json(fields: dict[str, Any], escape: bool) -> str:
    try:
        return json.dumps(fields, ensure_ascii=escape, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(fields), ensure_ascii=escape, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
