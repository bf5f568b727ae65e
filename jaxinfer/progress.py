"""Progress on stderr: a line that is rewritten on a terminal, a plain line now and then elsewhere."""

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator

from jaxinfer.metrics import EngineMetrics
from jaxinfer.planner import format_bytes

Advance = Callable[[int, int], None]  # (done, total)

# Seconds from one writing to the next. In between, a call costs a look at the clock.
_TERMINAL_INTERVAL_S, _LOG_INTERVAL_S = 0.1, 10.0


class Progress:
    """Writes nothing unless enabled."""

    def __init__(self, enabled: bool):
        self._enabled = enabled

    def line(self, text: str) -> None:
        if self._enabled:
            print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def phase(self, title: str, unit: str, details: Callable[[], str] | None = None) -> Iterator[Advance]:
        """Yields a function to call with (done, total); ends with a line that says how much and how long.

        Without a terminal a line says when the phase begins, for it may take minutes. After an exception the last
        line stays as it was. `details` has more to say each time.
        """
        has_terminal = sys.stderr.isatty()
        start = time.perf_counter()
        interval_s = _TERMINAL_INTERVAL_S if has_terminal else _LOG_INTERVAL_S
        written = start - interval_s if has_terminal else start
        last = (0, 0)

        def advance(done: int, total: int) -> None:
            nonlocal last, written
            last = (done, total)
            if not self._enabled or (now := time.perf_counter()) - written < interval_s:
                return
            written = now
            done_text = format_bytes(done) if unit == "bytes" else str(done)
            text = f"{title}: {done_text} of {_amount(total, unit)}" + (f", {details()}" if details else "")
            if has_terminal:  # cut, because only one row can be written again
                print(f"\r{text[: shutil.get_terminal_size().columns - 1]}\033[K", end="", file=sys.stderr, flush=True)
            else:
                self.line(text)

        if not has_terminal:
            self.line(f"{title} ...")
        finished = False
        try:
            yield advance
            finished = True
        finally:
            if self._enabled and has_terminal and last[1]:
                print("\r\033[K" if finished else "\n", end="", file=sys.stderr, flush=True)
        seconds = time.perf_counter() - start
        rate = f", {last[0] / 1e9 / seconds:.2f} GB/s" if unit == "bytes" else ""
        end = f", {details()}" if details else ""
        self.line(f"{title}: {_amount(last[0], unit)} in {seconds:.1f} s{rate}{end}")

    def generation(self, metrics: Callable[[], EngineMetrics]) -> contextlib.AbstractContextManager[Advance]:
        """A phase in which an engine generates."""
        start_tokens, start = metrics().generation_tokens, time.perf_counter()

        def details() -> str:
            now = metrics()
            tokens_per_s = (now.generation_tokens - start_tokens) / (time.perf_counter() - start)
            held = f", {now.num_running} running, {now.num_waiting} waiting, cache {now.kv_cache_usage:.0%}"
            return f"{tokens_per_s:.1f} tokens/s" + (held if now.num_running else "")

        return self.phase("generating", "requests", details)


def _amount(value: int, unit: str) -> str:
    return format_bytes(value) if unit == "bytes" else f"{value} {unit}"
