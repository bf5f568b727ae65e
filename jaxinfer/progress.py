"""Progress of start-up on stderr: a bar on a terminal, a few plain lines elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

from jaxinfer.planner import format_bytes

Advance = Callable[[int, int], None]  # (done, total)


class Progress:
    """Writes nothing unless enabled."""

    def __init__(self, enabled: bool):
        self._enabled = enabled

    def line(self, text: str) -> None:
        if self._enabled:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def phase(self, title: str, unit: str) -> Iterator[Advance]:
        """Yields a function to call with (done, total); ends with a line that says how much and how long.

        Without a terminal a line says when the phase begins, for it may take minutes. After an exception the bar
        stays as it was, on a line of its own.
        """
        start = time.perf_counter()
        last = (0, 0)
        has_bar = self._enabled and sys.stderr.isatty()

        def advance(done: int, total: int) -> None:
            nonlocal last
            last = (done, total)
            if has_bar:
                done_text = format_bytes(done) if unit == "bytes" else str(done)
                bar = f"\r{title}: {done_text} of {_amount(total, unit)}\033[K"
                print(bar, end="", file=sys.stderr, flush=True)

        if not has_bar:
            self.line(f"{title} ...")
        finished = False
        try:
            yield advance
            finished = True
        finally:
            if has_bar and last[1]:
                print("\r\033[K" if finished else "\n", end="", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start
        rate = f", {last[0] / 1e9 / seconds:.2f} GB/s" if unit == "bytes" else ""
        self.line(f"{title}: {_amount(last[0], unit)} in {seconds:.1f} s{rate}")


def _amount(value: int, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else f"{value} {unit}"
