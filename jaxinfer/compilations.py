"""Compiles programs side by side, and counts what JAX compiles in this process."""

import functools
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import jax

from jaxinfer.compilation_cache import program_store, without_cache
from jaxinfer.programs import Program

Key = TypeVar("Key")


def compile_all(
    programs: Mapping[Key, Program], progress: Callable[[int, int], None] | None = None
) -> dict[Key, jax.stages.Compiled]:
    """The compiled program of each key, calling `progress(done, total)` after each."""
    compiled: dict[Key, jax.stages.Compiled] = {}
    pool = ThreadPoolExecutor()
    try:
        futures = {pool.submit(compile_program, program): key for key, program in programs.items()}
        for future in as_completed(futures):
            compiled[futures[future]] = future.result()
            if progress is not None:
                progress(len(compiled), len(programs))
    finally:
        pool.shutdown(cancel_futures=True)  # a program that failed must not wait for those behind it
    return compiled


def compile_program(program: Program) -> jax.stages.Compiled:
    """Loaded, if programs are kept and this one was compiled before."""
    store = program_store()
    if store is None:
        return program.lower().compile()
    if (loaded := store.load(program)) is not None:
        return loaded
    with without_cache:
        compiled = program.lower().compile()
    store.save(program, compiled)
    return compiled


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
