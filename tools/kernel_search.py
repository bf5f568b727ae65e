"""Looks for settings of a kernel that are faster than those it has, and keeps them."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax

from jaxinfer.tools.kernel_timing import Timer, medians
from jaxinfer.tools.kernel_work import Work
from pallas_kernels import tuning
from pallas_kernels.paged_attention.tiling import Tuning

LADDERS = {
    "block_tokens": (16, 32, 64, 128, 256),
    "num_warps": (1, 2, 4, 8),
    "num_stages": (1, 2, 3, 4, 5, 6),
    "extra_items": (16, 32, 64, 128, 256, 512),
    "min_blocks": (1, 2, 4, 8, 16, 32),
    "max_rows": (16, 32, 64, 128),
}
_WORTH = 1.01  # times as fast: less may be chance


def moves(settings: Tuning, ladders: dict[str, tuple[int, ...]]) -> Iterator[Tuning]:
    """Those with one setting a step up or down."""
    for name, ladder in ladders.items():
        value = getattr(settings, name)
        below, above = [x for x in ladder if x < value], [x for x in ladder if x > value]
        for new in (*below[-1:], *above[:1]):
            yield dataclasses.replace(settings, **{name: new})


def search(
    start: Tuning,
    ladders: dict[str, tuple[int, ...]],
    speedup: Callable[[Tuning, Tuning], float],
    is_over: Callable[[], bool],
) -> Tuning:
    """The best that is found; `speedup(old, new)` is how many times as fast the new one is."""
    best, tried = start, {start}
    while not is_over():
        new = next((move for move in moves(best, ladders) if move not in tried), None)
        if new is None:
            break
        tried.add(new)
        if (ratio := speedup(best, new)) > _WORTH:
            print(f"{ratio:.3f} times as fast: {new}", flush=True)
            best = new
    return best


class Speedup:
    """Over some cases, each with the settings timed beside the others."""

    def __init__(self, cases: dict[str, Work], rounds: int, num_calls: int):
        self._cases, self._rounds, self._num_calls = cases, rounds, num_calls
        self._timers: dict[tuple[str, Tuning], Timer] = {}
        self._limits: dict[str, float] = {}

    def __call__(self, old: Tuning, new: Tuning) -> float:
        ratios = []
        for text, work in self._cases.items():
            before = self._timer(text, old)
            try:
                after = self._timer(text, new)
            except jax.errors.JaxRuntimeError as reason:
                print(f"cannot: {new}: {str(reason).splitlines()[0]}", flush=True)
                return 0.0
            limit = self._limits.setdefault(text, 2 * work.error(before.result))
            if not (error := work.error(after.result)) <= limit:
                print(f"wrong: {new}: error {error:.1e} in {text}", flush=True)
                return 0.0
            seconds = medians({"old": before, "new": after}, self._rounds)
            ratios.append(seconds["old"] / seconds["new"])
        return math.exp(sum(map(math.log, ratios)) / len(ratios))

    def _timer(self, text: str, settings: Tuning) -> Timer:
        if (text, settings) not in self._timers:
            work = self._cases[text]
            operation = work.ours("triton", tuning=settings)
            self._timers[text, settings] = Timer(operation, work.q, work.turns, self._num_calls)
        return self._timers[text, settings]


def keep(path: pathlib.Path, entry: dict[str, Any]) -> None:
    """Adds it to the file, instead of one for the same calls."""
    same = ("kernel", "for")
    others = [e for e in tuning.read(path) if any(e[name] != entry[name] for name in same)]
    text = json.dumps([*others, entry], indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    unfinished.write_text(text, "utf-8")
    unfinished.replace(path)
    tuning.read.cache_clear()
