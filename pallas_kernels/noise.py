"""Noise that depends on a key and a place alone, in the same bits as JAX's."""

import jax
import jax.numpy as jnp
from jax import lax

_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))


def gumbel(seed: jax.Array, position: jax.Array, token_ids: jax.Array) -> jax.Array:
    """float32, for each of the uint32 `token_ids` what jax.random.gumbel makes of (seed, position), a key of two words.

    In numbers of JAX's, whatever else is asked for with it.
    """
    bits = threefry(seed, position, token_ids)
    uniform = lax.bitcast_convert_type((bits >> 9) | jnp.uint32(0x3F800000), jnp.float32) - 1.0
    return -jnp.log(-jnp.log(jnp.maximum(uniform, jnp.finfo(jnp.float32).tiny)))


def threefry(seed: jax.Array, position: jax.Array, counters: jax.Array) -> jax.Array:
    """uint32 bits for each counter: Threefry-2x32 of 20 rounds (Salmon et al. 2011) with the key (seed, position).

    As `jax.random.bits` gives them, which on a CPU rolls the rounds into a loop over memory: 12 times slower.
    """
    keys = (seed, position, seed ^ position ^ jnp.uint32(0x1BD11BDA))
    high, low = jnp.full_like(counters, keys[0]), counters + keys[1]
    for i in range(5):
        for rotation in _ROTATIONS[i % 2]:
            high += low
            low = (low << rotation) | (low >> (32 - rotation))
            low ^= high
        high += keys[(i + 1) % 3]
        low += keys[(i + 2) % 3] + jnp.uint32(i + 1)
    return high ^ low


def ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 do."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))
