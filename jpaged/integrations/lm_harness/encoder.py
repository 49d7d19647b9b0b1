# SPDX-License-Identifier: Apache-2.0
"""How texts of lm-evaluation-harness become tokens, as its own model `hf` has them."""

import tokenizers

from jpaged.engine import Engine
from jpaged.host.checks import checked
from jpaged.text import encode


class Encoder:
    """Encodes texts of tasks.

    Attributes:
      tokenizer: the model's.
      prefix: token that a text without a context is scored after.
      eot: token that ends a text; None where the model does not say.
    """

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        engine: Engine,
        prefix_token_id: int | None,
        add_bos_token: bool | None,
    ):
        """Finds what texts begin and end with; see `JpagedLM`.

        Raises:
          ValueError: if an argument is none, or what the model does not say is needed.
        """
        self.tokenizer = tokenizer
        named, config = engine.chat_template.special_tokens, engine.model_config
        self._bos, self.eot = (
            tokenizer.token_to_id(named.get(name, "")) for name in ("bos_token", "eos_token")
        )
        if self._bos is None and self.eot is None:  # there are no settings of the tokenizer
            self._bos, self.eot = config.bos_token_id, next(iter(config.eos_token_ids), None)
        self._add_bos_token = checked("add_bos_token", add_bos_token, bool | None)
        if self._add_bos_token and self._bos is None:
            raise ValueError(
                "add_bos_token=True needs a bos_token, which neither tokenizer_config.json nor "
                "config.json of the model has: leave it alone"
            )
        given = checked("prefix_token_id", prefix_token_id, int | None)
        if given is not None and not 0 <= given < config.vocab_size:
            raise ValueError(
                f"prefix_token_id={given} is outside the vocabulary, [0, {config.vocab_size}): "
                "leave it alone for the tokenizer's own"
            )
        prefix = next((own for own in (given, self._bos, self.eot) if own is not None), None)
        if prefix is None:
            raise ValueError(
                "neither tokenizer_config.json nor config.json of the model names a token that "
                "begins or ends a text: give prefix_token_id=TOKEN, after which texts are scored"
            )
        self.prefix = prefix

    def text_of(self, token: int) -> str:
        """Returns a token's text, of special ones too."""
        return self.tokenizer.decode([token], skip_special_tokens=False)

    def encode(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Returns a text's token ids.

        Args:
          text: Unicode.
          add_special_tokens: whether those are added that the tokenizer adds to a text. None does
            what add_bos_token says, but adds none where the text begins with the prefix token.
        """
        if add_special_tokens is not None:
            return encode(self.tokenizer, text, add_special_tokens=add_special_tokens)
        begun = text.startswith(self.text_of(self.prefix))
        add = self._add_bos_token is not False and not begun
        tokens = encode(self.tokenizer, text, add_special_tokens=add)
        if add and self._add_bos_token and tokens[:1] != [self._bos]:
            assert self._bos is not None
            tokens.insert(0, self._bos)
        return tokens
