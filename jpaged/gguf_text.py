# SPDX-License-Identifier: Apache-2.0
"""Tokenizer and chat templates of GGUF files, of their metadata.

A vocabulary is a list there, and what is done to a text before is a name, whose meaning is that of
the tokenizer.json that the name was given for. What has no meaning here is refused by name.
"""

from types import MappingProxyType
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors

from jpaged.chat import ChatTemplate
from jpaged.models.gguf_file import GgufFile
from jpaged.models.json_fields import listed, shown, typed
from jpaged.text import checked_tokenizer, is_fault

_PREFIX = "tokenizer.ggml."
# Kinds of tokens, by the format's number.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
# How tokenizer.ggml.pre has a text split: a pattern, or None for GPT-2's own, which ByteLevel has.
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
    rf"{_SPACES}"
)
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}|"
    rf" ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_SPACES}"
)
_PATTERNS = MappingProxyType(
    {
        "gpt-2": None,
        "smollm": None,
        "llama-bpe": _LLAMA3,
        "llama3": _LLAMA3,
        "llama-v3": _LLAMA3,
        "smaug-bpe": _LLAMA3,
        "qwen2": _QWEN2,
        "deepseek-r1-qwen": _QWEN2,
        "megrez": _QWEN2,
        "tekken": _TEKKEN,
    }
)
_EACH_DIGIT = ("smollm",)
_COMPOSED = ("qwen2", "deepseek-r1-qwen", "megrez")
# Those that look for a whole word in the vocabulary first, and begin texts with a token.
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3", "tekken")
_READ = frozenset(
    {
        *("model", "pre", "tokens", "token_type", "scores", "merges"),
        *("add_bos_token", "add_eos_token", "add_space_prefix"),
        *(f"{name}_token_id" for name in ("bos", "eos", "unknown", "padding", "eot", "eom")),
        # Not used: of other tasks.
        *(f"{name}_token_id" for name in ("seperator", "separator", "cls", "mask")),
        *(f"fim_{part}_token_id" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
        *(f"{part}_token_id" for part in ("prefix", "suffix", "middle")),
        "token_type_count",
    }
)


def tokenizer_of(file: GgufFile) -> tokenizers.Tokenizer | None:
    """Makes the tokenizer of a file; None where it has none.

    Raises:
      ValueError: if it is one that is not supported, or damaged; one line that names file and key.
    """
    if file.metadata.get(f"{_PREFIX}model") in (None, "none", "no_vocab"):
        return None
    try:
        return checked_tokenizer(_Vocabulary(file).tokenizer())
    except BaseException as e:
        if not is_fault(e):
            raise
        reason = " ".join(str(e).split())
        raise ValueError(f"{file.path}: its tokenizer cannot be used: {reason:.400}") from e


def chat_template_of(file: GgufFile) -> ChatTemplate:
    """Reads the chat templates of a file.

    Raises:
      ValueError: if one is no text, or a special token is none of the vocabulary.
    """
    templates: dict[str, str] = {}
    for key, value in file.metadata.items():
        first, _, name = key.partition("tokenizer.chat_template")
        if not first and (not name or name.startswith(".")):
            templates[name.removeprefix(".") or "default"] = value
    tokens = file.metadata.get(f"{_PREFIX}tokens")
    special: dict[str, str] = {}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        number = file.metadata.get(f"{_PREFIX}{key}_token_id")
        if isinstance(tokens, list) and isinstance(number, int) and 0 <= number < len(tokens):
            special[f"{name}_token"] = tokens[number]
    try:
        return ChatTemplate(templates, special)
    except ValueError as e:
        raise ValueError(f"{file.path}: its chat template cannot be used: {e}") from e


class _Vocabulary:
    """The tokens of a file, and what else its metadata says of them."""

    def __init__(self, file: GgufFile):
        self._own = {
            key.removeprefix(_PREFIX): value
            for key, value in file.metadata.items()
            if key.startswith(_PREFIX)
        }
        if unknown := {f"{_PREFIX}{k}": v for k, v in self._own.items() if v and k not in _READ}:
            raise ValueError(f"{listed(unknown)}: not supported")
        self._tokens = self._list("tokens", str)
        self._kinds = [_NORMAL] * len(self._tokens)
        if "token_type" in self._own:
            self._kinds = self._list("token_type", int, len(self._tokens))
        self._ids = {token: number for number, token in enumerate(self._tokens)}
        if len(self._ids) < len(self._tokens):
            twice = next(t for i, t in enumerate(self._tokens) if self._ids[t] != i)
            raise ValueError(f"{_PREFIX}tokens has {shown(twice)} twice")

    def tokenizer(self) -> tokenizers.Tokenizer:
        """Makes the tokenizer."""
        model = self._value("model", str)
        if model == "gpt2":
            tokenizer, begins = self._byte_level()
        elif model == "llama":
            tokenizer, begins = self._sentencepiece(), True
        else:
            raise ValueError(
                f"{_PREFIX}model={shown(model)} is not supported; supported: 'gpt2' (byte-level "
                "BPE), 'llama' (SentencePiece)"
            )
        added = [
            # User-defined ones are text, and are found before anything is made of it.
            AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
            for token, kind in zip(self._tokens, self._kinds, strict=True)
            if kind in (_CONTROL, _UNKNOWN, _USER_DEFINED)
        ]
        # The library takes the list apart by this; they have their numbers already.
        tokenizer.add_tokens([token for token in added if not token.special])
        tokenizer.add_special_tokens([token for token in added if token.special])
        ends = [
            (name, self._special(key, name))
            for name, key in (("bos", "add_bos_token"), ("eos", "add_eos_token"))
            if self._value(key, bool, begins if name == "bos" else False)
        ]
        if ends:
            around = {name: self._tokens[number] for name, number in ends}
            single = [around.get("bos"), "$A", around.get("eos")]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[piece for piece in single if piece is not None],
                special_tokens=[(self._tokens[number], number) for _, number in ends],
            )
        return tokenizer

    def _byte_level(self) -> tuple[tokenizers.Tokenizer, bool]:
        """And whether texts begin with a token, where the file does not say."""
        pre = self._value("pre", str, "")
        if pre not in _PATTERNS:
            raise ValueError(
                f"{_PREFIX}pre={shown(pre)} is not supported; supported: {', '.join(_PATTERNS)}. "
                "Files of early 2024 and before have none: convert the model anew"
            )
        merges = [tuple(merge.split(" ")) for merge in self._list("merges", str)]
        tokenizer = tokenizers.Tokenizer(
            models.BPE(self._ids, merges, ignore_merges=pre in _WHOLE_WORDS)
        )
        if pre in _COMPOSED:
            tokenizer.normalizer = normalizers.NFC()
        pattern, first = _PATTERNS[pre], []
        if pattern is not None:
            first = [pre_tokenizers.Split(Regex(pattern), behavior="isolated")]
        elif pre in _EACH_DIGIT:
            first = [pre_tokenizers.Digits(individual_digits=True)]
        bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*first, bytes_of])
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer, pre in _WHOLE_WORDS

    def _sentencepiece(self) -> tokenizers.Tokenizer:
        unknown = self._special("tokenizer with byte tokens", "unknown")
        tokenizer = tokenizers.Tokenizer(
            models.BPE(
                self._ids,
                self._merges_by_score(),
                unk_token=self._tokens[unknown],
                fuse_unk=True,
                byte_fallback=True,
            )
        )
        prefix = self._value("add_space_prefix", bool, True)
        first = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", "▁")])
        last = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *last]
        )
        return tokenizer

    def _merges_by_score(self) -> list[tuple[str, str]]:
        """Every way to make a token of two, in the order in which SentencePiece takes them.

        It joins the neighbours whose text is the token of the highest score, wherever this came
        from, and of equal ones the leftmost.
        """
        scores = self._list("scores", float, len(self._tokens))
        joined = {
            token: score
            for token, score, kind in zip(self._tokens, scores, self._kinds, strict=True)
            if kind in (_NORMAL, _UNUSED)
        }
        ranked = sorted(joined, key=lambda token: -joined[token])
        return [
            (token[:cut], token[cut:])
            for token in ranked
            for cut in range(1, len(token))
            if token[:cut] in joined and token[cut:] in joined
        ]

    def _special(self, key: str, name: str) -> int:
        """The number of the token that stands for something."""
        number = self._own.get(f"{name}_token_id")
        if not isinstance(number, int) or not 0 <= number < len(self._tokens):
            raise ValueError(
                f"{_PREFIX}{name}_token_id={shown(number)} must be one of {len(self._tokens)} "
                f"tokens, as {key} asks for it"
            )
        return number

    def _value(self, key: str, kind: type, default: Any = None) -> Any:
        return typed(f"{_PREFIX}{key}", self._own.get(key, default), kind)

    def _list(self, key: str, kind: type, length: int | None = None) -> list[Any]:
        values = self._value(key, list)
        if length is not None and len(values) != length:
            raise ValueError(f"{_PREFIX}{key} has {len(values)} entries for {length} tokens")
        if values and not isinstance(values[0], kind):  # a list is of one type
            raise ValueError(f"{_PREFIX}{key} must be a list of {kind.__name__}")
        return values
