"""Turns generated tokens into text that never has to be taken back. Host only."""

from collections.abc import Sequence

from jaxinfer.tokenizer import TextStream


class OutputText:
    """The text of one output, growing.

    Held back until they are decided: bytes of an unfinished character, and an ending that could become a stop
    string. `text` holds only what stays.
    """

    def __init__(
        self, stream: TextStream | None, stop: Sequence[str], *, include_stop: bool = False, min_tokens: int = 0
    ):
        self._stream = stream
        self._stop = stop
        self._include_stop = include_stop
        self._num_early = min_tokens  # tokens to come within which no stop string may end
        self._held = ""
        self.text = ""
        self.error: Exception | None = None  # of the decoder, which can raise anything; the text ends before it

    def add(self, token_ids: Sequence[int]) -> bool:
        """Appends tokens; True once a stop string was reached, which `text` then ends before, or with if included.

        True, too, where the decoder failed.
        """
        if self._stream is None:
            return False
        try:
            new = self._stream.add(token_ids)
        except Exception as error:
            self._stream, self.error = None, error
            return True
        self._num_early -= len(token_ids)
        return self._append(new)

    def finish(self) -> None:
        """Releases what was held back: no more tokens will come."""
        try:
            if self._stream is not None and not self._append(self._stream.finish()):
                self.text += self._held
        except Exception as error:
            self.error = error
        self._held = ""

    def _append(self, new: str) -> bool:
        pending = self._held + new
        found = [(at, stop) for stop in self._stop if (at := pending.find(stop)) >= 0]
        if found and self._num_early < 0:
            at, stop = min(found)
            self.text += pending[: at + len(stop) if self._include_stop else at]
            self._held = ""
            self._stream = None
            return True
        keep = max((_overlap(pending, stop) for stop in self._stop), default=0)
        self.text += pending[: len(pending) - keep]
        self._held = pending[len(pending) - keep :]
        return False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
