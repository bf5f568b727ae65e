"""Counts what JAX compiles in this process."""

import functools

import jax


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
