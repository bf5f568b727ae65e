"""Compiles programs side by side, and counts what else JAX compiles in this process."""

import contextlib
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Generic, TypeVar

import jax

from jaxinfer.compilation_cache import program_store, without_cache
from jaxinfer.programs import Program

Key = TypeVar("Key")


class Compiling(Generic[Key]):
    """Programs that are being compiled side by side, the first ones first; each can be had as soon as it is ready.

    Who waits for one must not give these threads less of the processors: they trace while they hold Python's lock.
    """

    def __init__(self, programs: Mapping[Key, Program]):
        _counter()  # both made by one thread, before several ask for them
        program_store()
        self._start = self._last_end = time.perf_counter()
        self._programs = dict(programs)
        self._pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self._futures = {key: self._pool.submit(self._compile, each) for key, each in self._programs.items()}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._programs)

    def __contains__(self, key: object) -> bool:
        return key in self._programs

    def __getitem__(self, key: Key) -> jax.stages.Compiled:
        """Waits for it; what nobody has begun is compiled by who asks, and again if that failed."""
        future = self._futures[key]
        if future.cancel() or future.cancelled():
            compiled = self._compile(self._programs[key])
            self._futures[key] = future = Future()
            future.set_result(compiled)
        return future.result()

    def has(self, key: Key) -> bool:
        """Whether nobody has to wait for it."""
        return (future := self._futures[key]).done() and not future.cancelled()

    @property
    def is_done(self) -> bool:
        return all(future.done() for future in self._futures.values())

    def wait(self, progress: Callable[[int, int], None] | None = None) -> float:
        """For all, calling `progress(done, total)` after each -> seconds from the beginning until the last was done.

        What one raises ends it, and those not begun.
        """
        try:
            begun = [future for future in self._futures.values() if not future.cancelled()]
            for done, future in enumerate(as_completed(begun), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(begun))
        finally:
            self.close()
        return self._last_end - self._start

    def close(self) -> None:
        """Begins no more by itself; waits for those that are under way."""
        self._pool.shutdown(cancel_futures=True)

    def _compile(self, program: Program) -> jax.stages.Compiled:
        compiled = compile_program(program)
        self._last_end = time.perf_counter()
        return compiled


def compile_all(programs: Mapping[Key, Program]) -> dict[Key, jax.stages.Compiled]:
    """The compiled program of each key."""
    compiling = Compiling(programs)
    compiling.wait()
    return {key: compiling[key] for key in compiling}


def compile_program(program: Program) -> jax.stages.Compiled:
    """Loaded, if programs are kept and this one was compiled before."""
    store = program_store()
    if store is None:
        return _compile(program)
    if (loaded := store.load(program)) is not None:
        return loaded
    with without_cache if jax.config.values["jax_compilation_cache_dir"] else contextlib.nullcontext():
        compiled = _compile(program)
    store.save(program, compiled)
    return compiled


def num_compilations() -> int:
    """Programs that JAX compiled or read from its cache since the first call, but for those that are compiled here."""
    return _counter().count


def _compile(program: Program) -> jax.stages.Compiled:
    with _counter().paused():
        return program.lower().compile()


class _Counter:
    def __init__(self):
        self.count = 0
        self._of_thread = threading.local()
        jax.monitoring.register_event_duration_secs_listener(self._listen)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """In this thread."""
        self._of_thread.is_paused = True
        try:
            yield
        finally:
            self._of_thread.is_paused = False

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        is_compilation = event == "/jax/core/compile/backend_compile_duration"
        self.count += is_compilation and not getattr(self._of_thread, "is_paused", False)


@functools.cache
def _counter() -> _Counter:
    """One per process: JAX has no public way to take a listener away."""
    return _Counter()
