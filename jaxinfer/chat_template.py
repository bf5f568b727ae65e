"""A conversation as token ids, in which what a person typed is text and only the template's tokens are control.

A template's output is one string, and a tokenizer takes every spelling of a special token in it for the token, so a
user who types "<|im_end|>" would end their own turn. Encoding the pieces apart would change the tokens at the seams.
So each spelling in a message is broken by a mark before rendering, and the tokenizer that reads the result has one
normalizer more, which removes the mark: special tokens are looked for before normalizing, all else happens after.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

# Two code points that Unicode keeps for a program's own use, and that no text has.
_MARK = "\ufdd0\ufdd1"


class ChatTemplate:
    """The template of a transformers tokenizer."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer

    def encode(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids up to where the assistant's next message begins, as transformers' `apply_chat_template` gives
        them for messages that spell no special token.

        Raises ValueError where a spelling cannot be kept as text, and whatever the template raises.
        """
        marked = [{key: self._mark(value) for key, value in message.items()} for message in messages]
        if marked == [*map(dict, messages)]:
            return self._tokenizer.encode(self._render(messages), add_special_tokens=False, verbose=False)
        rendered = self._render(marked)
        if rendered.replace(_MARK, "") != self._render(messages) or not self._tokenizer.is_fast:
            raise ValueError(self._refusal(messages))
        encoding = self._unmarking.encode(rendered, add_special_tokens=False)
        for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            found = rendered[start:stop]
            if _MARK in found and found.replace(_MARK, "").strip() == self._special_tokens.get(token_id):
                raise ValueError(self._refusal(messages))
        return encoding.ids

    def _render(self, messages: Sequence[Mapping[str, str]]) -> str:
        return self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, tokenize=False
        )

    @functools.cached_property
    def _special_tokens(self) -> dict[int, str]:
        added = self._tokenizer.added_tokens_decoder
        return {token_id: token.content for token_id, token in added.items() if token.special and token.content}

    @functools.cached_property
    def _spellings(self) -> re.Pattern[str]:
        """The first character of every spelling, overlapping ones too."""
        spellings = "|".join(map(re.escape, self._special_tokens.values()))
        return re.compile(f"(?=(?:{spellings}))." if spellings else "(?!)", re.DOTALL)

    def _mark(self, value: Any) -> Any:
        return self._spellings.sub(lambda match: match[0] + _MARK, value) if isinstance(value, str) else value

    @functools.cached_property
    def _unmarking(self) -> Any:
        """A copy of the tokenizer that removes the marks before it cuts words."""
        from tokenizers import Tokenizer, normalizers

        copy = Tokenizer.from_str(self._tokenizer.backend_tokenizer.to_str())
        copy.no_truncation()
        copy.no_padding()
        unmark = normalizers.Replace(_MARK, "")
        copy.normalizer = unmark if copy.normalizer is None else normalizers.Sequence([unmark, copy.normalizer])
        return copy

    def _refusal(self, messages: Sequence[Mapping[str, str]]) -> str:
        text = " ".join(value for message in messages for value in message.values() if isinstance(value, str))
        spelt = [token for token in self._special_tokens.values() if token in text]
        return (
            f"messages spell the special tokens {spelt}, and here they could not be told from the tokens; rephrase them"
        )
