"""How fast a device reads its memory, measured: the ceiling of decoding."""

import time

import jax
import jax.numpy as jnp

from jaxinfer import devices

_ARRAY_BYTES = {"cpu": 256 * 2**20, "gpu": 4 * 2**30}
_MIN_ARRAY_BYTES = 64 * 2**20  # less fits into a device's own cache, whose speed is another
_ROW = 1024  # float32 values
_ROUNDS = 5


def measure_read_bandwidth(device: jax.Device) -> float:
    """Bytes per second of summing a large float32 array on `device`, best of a few rounds.

    The array takes at most a quarter of the memory that is free, for weights and cache may be there. Raises
    RuntimeError when that is too little to measure with.
    """
    num_bytes = _array_bytes(device.platform, devices.free_bytes(device))
    with jax.default_device(device):
        array = jnp.ones(num_bytes // 4, jnp.float32)
        # Bandwidth is what a weight-reading step sees, so the sum is a matrix-vector product's access pattern.
        total = jax.jit(lambda x: jnp.sum(x.reshape(-1, _ROW), axis=1))
        total(array).block_until_ready()
        best = float("inf")
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            total(array).block_until_ready()
            best = min(best, time.perf_counter() - start)
        array.delete()
    return num_bytes / best


def _array_bytes(platform: str, free_bytes: int | None) -> int:
    """Whole rows of float32 values."""
    num_bytes = _ARRAY_BYTES.get(platform, 2**30)
    if free_bytes is not None:
        num_bytes = min(num_bytes, free_bytes // 4)
    if num_bytes < _MIN_ARRAY_BYTES:
        raise RuntimeError(f"{free_bytes} bytes are free; measuring the bandwidth takes {4 * _MIN_ARRAY_BYTES}")
    return num_bytes // (4 * _ROW) * (4 * _ROW)
