"""Seconds that a device takes for one operation among many of the same, and what it can at most."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Operation = Callable[[Any, Any], Any]  # (x, what takes turns) -> what is computed


class Timer:
    """Times a loop of calls in one dispatch, so that the host is not in it.

    Each call gets x from the one before, unchanged: XLA does not see that, and so cannot move it out of the loop; and
    what the last calls computed comes out of the loop, so none can be left out. What a call computes from other
    arguments alone XLA may move, as out of a model's layers. `turns` take turns, so that what is read is not still near
    the cores from the call before. With `is_update` x is what the call before has made of it, in place.
    """

    def __init__(self, operation: Operation, x: Any, turns: Sequence[Any], num_calls: int, *, is_update: bool = False):
        self._num_calls, self._turns = num_calls * len(turns), turns
        computed = () if is_update else [jax.eval_shape(operation, x, turn) for turn in turns]

        def loop(state: tuple[Any, Any], turns: Sequence[Any]) -> tuple[Any, Any]:
            def call_each(_: jax.Array, state: tuple[Any, Any]) -> tuple[Any, Any]:
                x, news = state[0], []
                for turn in turns:
                    new = operation(x, turn)
                    if is_update:
                        x = new
                    else:
                        x, new = lax.optimization_barrier((x, new))
                        news.append(new)
                return x, tuple(news)

            return lax.fori_loop(0, num_calls, call_each, state)

        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), tuple(computed))
        self._state = (jax.tree.map(jnp.copy, x), zeros)  # x is donated with the rest, and others have it too
        self._loop = jax.jit(loop, donate_argnums=0).lower(self._state, turns).compile()
        self.seconds()  # what happens the first time only

    def seconds(self) -> float:
        """Of one call."""
        start = time.perf_counter()
        self._state = jax.block_until_ready(self._loop(self._state, self._turns))
        return (time.perf_counter() - start) / self._num_calls

    @property
    def result(self) -> Any:
        """What a call of the first turn computes."""
        return self._state[1][0]


Ways = Mapping[str, tuple[Operation, Sequence[Any]]]  # by name, what computes the same, and of what


def timers_that_can(ways: Ways, x: Any, num_calls: int) -> tuple[dict[str, Timer], dict[str, Any]]:
    """And of the other ways why they cannot."""
    timers, reasons = {}, {}
    for name, (operation, turns) in ways.items():
        try:
            timers[name] = Timer(operation, x, turns, num_calls)
        except Exception as error:  # others' kernels raise what they like, and the rest is still worth knowing
            reasons[name] = (str(error) or repr(error)).splitlines()[0]
            print(f"{name} cannot: {reasons[name]}", flush=True)
    return timers, reasons


def medians(timers: dict[str, Timer], rounds: int) -> dict[str, float]:
    """Seconds of each. There and back, so that a device that gets slower does so for all."""
    found: dict[str, list[float]] = {name: [] for name in timers}
    for i in range(rounds):
        for name in list(timers)[:: -1 if i % 2 else 1]:
            found[name].append(timers[name].seconds())
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def copy_timer(num_bytes: int, num_calls: int) -> Timer:
    """Of reading and of writing `num_bytes` each."""
    return Timer(lambda x, y: x + y, jnp.ones(num_bytes // 4, jnp.float32), [jnp.float32(1)], num_calls)


def matmul_timer(size: int, num_calls: int) -> Timer:
    """Of the product of two bfloat16 matrices of `size` rows and columns: 2 * size ** 3 operations."""
    x, y = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    return Timer(jnp.matmul, x, [y], num_calls)


def measure_ceilings(num_calls: int, rounds: int, *, is_quick: bool) -> dict[str, float]:
    """What the device copies, in bytes read and written a second, and multiplies; prints both."""
    copied, size = (2**20, 128) if is_quick else (2**30, 8192)
    seconds = medians({"copy": copy_timer(copied, num_calls), "matmul": matmul_timer(size, num_calls)}, rounds)
    copies, multiplies = 2 * copied / seconds["copy"], 2 * size**3 / seconds["matmul"]
    print(f"copies {copies / 1e9:.1f} GB/s, multiplies {multiplies / 1e12:.2f} TFLOP/s", flush=True)
    return {"copy_bytes_per_s": copies, "matmul_flops_per_s": multiplies}
