"""Text to token ids and back, through transformers. Host only.

transformers is imported on first use, because that takes seconds; nothing from the model's directory is executed.
"""

import pathlib
from collections.abc import Sequence
from typing import Any

_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"  # what the bytes of an unfinished character decode to


def load_tokenizer(model_dir: pathlib.Path) -> "Tokenizer | None":
    """The directory's tokenizer, or None if it has none. Raises ValueError for files that cannot be used."""
    if not any((model_dir / name).exists() for name in _FILES):
        return None
    import transformers

    try:
        loaded = transformers.AutoTokenizer.from_pretrained(
            str(model_dir), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # the library raises bare Exception for a broken tokenizer.json
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{model_dir}: the tokenizer files cannot be read: {reason}") from None
    return Tokenizer(loaded)


class Tokenizer:
    """A model's tokenizer."""

    def __init__(self, loaded: Any):
        self._loaded = loaded

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._loaded.get_vocab().values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids, with the special tokens that the model wants around a text."""
        return self._loaded.encode(text)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._loaded.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def apply_chat_template(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that the assistant is to continue. Raises ValueError without a template."""
        if not self._loaded.chat_template:
            raise ValueError("the model has no chat template; use plain prompts")
        return self._loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)

    def stream(self, skip_special_tokens: bool = True) -> "TextStream":
        return TextStream(self, skip_special_tokens)


class TextStream:
    """Decodes tokens as they come: the texts it returns add up, and never end inside a character.

    Two offsets into the tokens: text up to `_read` has been returned; decoding starts at `_prefix`, a little
    earlier, because how a token reads (its leading space, say) depends on those before it. So the cost of a
    token does not grow with the output.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool):
        self._tokenizer = tokenizer
        self._skip_special_tokens = skip_special_tokens
        self._token_ids: list[int] = []
        self._prefix = self._read = 0

    def add(self, token_ids: Sequence[int]) -> str:
        """Takes tokens in; the text that they finish."""
        self._token_ids += token_ids
        text = self._pending()
        if text.endswith(_REPLACEMENT):
            return ""
        return self._advance(text)

    def finish(self) -> str:
        """The rest, unfinished characters included: no more tokens will come."""
        return self._advance(self._pending())

    def _pending(self) -> str:
        before = self._decode(self._prefix, self._read)
        return self._decode(self._prefix, len(self._token_ids))[len(before) :]

    def _advance(self, text: str) -> str:
        self._prefix, self._read = self._read, len(self._token_ids)
        return text

    def _decode(self, start: int, stop: int) -> str:
        return self._tokenizer.decode(self._token_ids[start:stop], self._skip_special_tokens)
