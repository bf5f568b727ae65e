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
        """Yields a function to call with (done, total); ends with a line that says how much and how long."""
        start = time.perf_counter()
        last = (0, 0)

        def advance(done: int, total: int) -> None:
            nonlocal last
            last = (done, total)
            if self._enabled and sys.stderr.isatty():
                print(
                    f"\r{title}: {_amount(done, unit)} of {_amount(total, unit)}\033[K",
                    end="",
                    file=sys.stderr,
                    flush=True,
                )

        yield advance
        seconds = time.perf_counter() - start
        rate = f", {last[0] / 1e9 / seconds:.2f} GB/s" if unit == "bytes" else ""
        clear = "\r\033[K" if sys.stderr.isatty() else ""
        self.line(f"{clear}{title}: {_amount(last[0], unit)} in {seconds:.1f} s{rate}")


def _amount(value: int, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else f"{value} {unit}"
