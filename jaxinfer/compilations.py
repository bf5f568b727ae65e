"""Compiles programs side by side, and counts what JAX compiles in this process."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import jax

Key = TypeVar("Key")


def compile_all(
    lowerings: Mapping[Key, Callable[[], jax.stages.Lowered]], progress: Callable[[int, int], None] | None = None
) -> dict[Key, jax.stages.Compiled]:
    """The program of each key, calling `progress(done, total)` after each."""
    programs: dict[Key, jax.stages.Compiled] = {}
    pool = ThreadPoolExecutor()
    try:
        futures = {pool.submit(lambda lower=lower: lower().compile()): key for key, lower in lowerings.items()}
        for future in as_completed(futures):
            programs[futures[future]] = future.result()
            if progress is not None:
                progress(len(programs), len(lowerings))
    finally:
        pool.shutdown(cancel_futures=True)  # a program that failed must not wait for those behind it
    return programs


def num_compilations() -> int:
    """Programs compiled, or read from the compilation cache, since the first call."""
    return _counter().count


class _Counter:
    def __init__(self):
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        self.count += event == "/jax/core/compile/backend_compile_duration"


@functools.cache
def _counter() -> _Counter:
    """One per process: JAX has no public way to take a listener away."""
    return _Counter()
