"""Text to token ids and back, through transformers' tokenizers. Host only; runs no code from a model directory."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxinfer.chat_template import ChatTemplate
from jaxinfer.model_files import check_files

# Any of these means that the directory wants to have a tokenizer.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "spiece.model",
    "vocab.json",
    "vocab.txt",
)
_REPLACEMENT = "\ufffd"  # what a decoder writes for bytes that are not, or not yet, a character


class Tokenizer:
    """A model's tokenizer: `load_tokenizer` makes it."""

    def __init__(self, tokenizer: Any, source: str, backend: Any = None):
        self._tokenizer = tokenizer
        self._backend = backend  # does the same as the tokenizer's own `decode`, in a third of the time
        self._source = source
        self._chat_template = ChatTemplate(tokenizer)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids, with the special tokens that the tokenizer puts around a text or without."""
        return self._tokenizer.encode(_encodable(text), add_special_tokens=add_special_tokens, verbose=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        # Without transformers' "clean up", which takes the space out of "a ." and so would take back text
        # that was already streamed.
        if self._backend is not None:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return self._tokenizer.decode(
            list(token_ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
        )

    def stream(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> "TextStream":
        """A decoder for tokens that arrive one by one, following the tokens `after`: a prompt or its end."""
        return TextStream(functools.partial(self.decode, skip_special_tokens=skip_special_tokens), after)

    @functools.cached_property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included; not the number of tokens where ids have gaps."""
        return max(self._tokenizer.get_vocab().values()) + 1

    @property
    def eos_token_id(self) -> int | None:
        return self._tokenizer.eos_token_id

    def apply_chat_template(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the assistant's next message begins.

        `messages` are {"role": ..., "content": ...}, in which the spelling of a special token is text. Raises
        ValueError if the model has no template or the template refuses them.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(f"{self._source}: the model has no chat template; give a plain prompt")
        for i, message in enumerate(messages):
            if not all(isinstance(message.get(key), str) for key in ("role", "content")):
                raise ValueError(f"messages[{i}]: expected text under role and content, found {dict(message)!r}")
            _encodable(message["content"])
        try:
            return self._chat_template.encode(messages)
        except Exception as error:  # a template is a program: it can raise anything
            raise ValueError(f"{self._source}: the chat template refuses the messages: {_one_line(error)}") from None


class TextStream:
    """Decodes a growing list of tokens into pieces of text that never have to be taken back.

    A token's text depends on its neighbours: a character may be spread over several tokens, and some decoders
    strip the first token's space. So a window of tokens is decoded, which begins one piece back, and what it adds
    to the text of the pieces before is new:

      window       tokens of the last piece, tokens held back, the new token
      window text  the last piece's text   , new piece; nothing yet while it ends in half a character

    The window does not grow with the text, so a token's cost does not either; where many tokens come together, many
    are decoded at once, which costs little more than one. The first "piece" is the end of the
    prompt, from the beginning of a character on.
    """

    _PIECE = 64  # tokens that are decoded at once where more come together
    _MAX_HELD = 16  # tokens; a character has at most 4 bytes, so by then the bytes are no character
    _CONTEXT = (4, 16)  # least and most tokens of the prompt; its last word and character are within them

    def __init__(self, decode: Callable[[list[int]], str], after: Sequence[int] = ()):
        self._decode = decode
        self._window = self._context(after)
        self._num_read = len(self._window)  # tokens at the window's start whose text was handed out
        self._read_text = decode(self._window) if after else ""  # and that text

    def add(self, token_ids: Sequence[int]) -> str:
        """The text that became certain with `token_ids`: the same however many come together."""
        if len(token_ids) == 1:
            return self._add(token_ids[0])
        pieces = [token_ids[i : i + self._PIECE] for i in range(0, len(token_ids), self._PIECE)]
        return "".join(map(self._add_piece, pieces))

    def finish(self) -> str:
        """The text that was held back: no more tokens will come."""
        text = self._unread(self._decode(self._window))[1]
        self._window, self._num_read, self._read_text = [], 0, ""
        return text

    def _add_piece(self, token_ids: Sequence[int]) -> str:
        """All in one go but what the last of them leave unfinished."""
        for stop in range(len(token_ids), max(0, len(token_ids) - 4), -1):
            window = [*self._window, *token_ids[:stop]]
            text = self._decode(window)
            if not text.endswith(_REPLACEMENT):
                start, new = self._unread(text)
                if new:
                    self._set_window(self._context(window[start:]))
                    return new + "".join(map(self._add, token_ids[stop:]))
                break
        return "".join(map(self._add, token_ids))

    def _add(self, token_id: int) -> str:
        self._window.append(token_id)
        must_release = len(self._window) - self._num_read >= self._MAX_HELD
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT) and not must_release:
            return ""
        start, new = self._unread(text)
        if new:
            self._set_window(self._window[start:])
        elif must_release:  # special tokens, skipped
            del self._window[self._num_read :]
        return new

    def _set_window(self, token_ids: list[int]) -> None:
        """To tokens whose text was handed out."""
        self._window, self._num_read, self._read_text = token_ids, len(token_ids), self._decode(token_ids)

    def _unread(self, text: str) -> tuple[int, str]:
        """The part of `text`, the window's, that was not handed out, and the token that it begins with."""
        start, whole = self._num_read, self._read_text
        # Where the two part, the last tokens that were read turned out to begin a character: it is still to come.
        while start and not (text.startswith(whole) and (start == self._num_read or not whole.endswith(_REPLACEMENT))):
            start -= 1
            whole = self._decode(self._window[:start])
        return start, text[len(whole) :]

    def _context(self, token_ids: Sequence[int]) -> list[int]:
        """The last of `token_ids`: so many that they begin where a character does, though they may end within one."""
        least, most = self._CONTEXT
        for size in range(least, most):
            context = list(token_ids[-size:])
            for num_bytes in range(4):  # of a character, which are not enough for it
                text = self._decode(context[: len(context) - num_bytes])
                if text and not text.startswith(_REPLACEMENT) and not text.endswith(_REPLACEMENT):
                    return context  # with text: a decoder may strip the space of the first word behind none
        return list(token_ids[-most:])


def load_tokenizer(model_dir: pathlib.Path) -> Tokenizer | None:
    """The directory's tokenizer; None if it has no tokenizer files. Raises ValueError if they cannot be read."""
    if not any((model_dir / name).exists() for name in _TOKENIZER_FILES):
        return None
    check_files(model_dir)
    # Imported here, because it takes a second or more and a model may have no tokenizer.
    if has_file := (model_dir / "tokenizer.json").exists():
        # As it stands in the file. AutoTokenizer would rebuild it by the rules of the class that
        # tokenizer_config.json names, and import PyTorch, where that is installed, to find the class.
        from transformers import PreTrainedTokenizerFast as Loader
    else:
        from transformers import AutoTokenizer as Loader
    try:
        tokenizer = Loader.from_pretrained(str(model_dir), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers and tokenizers raise anything for a broken file, bare Exception included
        raise ValueError(f"{model_dir}: the tokenizer files cannot be read: {_one_line(error)}") from error
    return Tokenizer(tokenizer, str(model_dir), tokenizer.backend_tokenizer if has_file else None)


def _encodable(text: str) -> str:
    """`text`, or ValueError for half of a surrogate pair, which is no character and has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"text has a lone surrogate at character {error.start}; it cannot be encoded") from None
    return text


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
