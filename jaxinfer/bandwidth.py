"""How fast a device reads its memory, measured: the ceiling of decoding."""

import time

import jax
import jax.numpy as jnp

_ARRAY_BYTES = {"cpu": 256 * 2**20, "gpu": 4 * 2**30}
_ROUNDS = 5


def measure_read_bandwidth(device: jax.Device) -> float:
    """Bytes per second of summing a large float32 array on `device`, best of a few rounds."""
    num_bytes = _ARRAY_BYTES.get(device.platform, 2**30)
    with jax.default_device(device):
        array = jnp.ones(num_bytes // 4, jnp.float32)
        # Bandwidth is what a weight-reading step sees, so the sum is a matrix-vector product's access pattern.
        total = jax.jit(lambda x: jnp.sum(x.reshape(-1, 1024), axis=1))
        total(array).block_until_ready()
        best = float("inf")
        for _ in range(_ROUNDS):
            start = time.perf_counter()
            total(array).block_until_ready()
            best = min(best, time.perf_counter() - start)
        array.delete()
    return num_bytes / best
