"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per token of each of the R / 2 rotating pairs, float32; R is the rotating share of head_dim."""
    rotary_dim = int(head_dim * rope.share)
    exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
    freqs = np.float32(1.0) / np.power(np.float32(rope.theta), exponents, dtype=np.float32)
    if rope.scaling == "default":
        return freqs
    if rope.scaling == "linear":
        return freqs / np.float32(rope.factor)
    if rope.scaling == "llama3":
        return _llama3(rope, freqs)
    if rope.scaling == "yarn":
        return _yarn(rope, freqs)
    raise ValueError(f"rope scaling {rope.scaling!r} is not implemented; known: default, linear, llama3, yarn")


def _llama3(rope: RopeConfig, freqs: np.ndarray) -> np.ndarray:
    """Keeps pairs that turn often within the original length, slows the rest by `factor`, blends between."""
    rotations = rope.original_max_position * freqs / (2 * math.pi)
    blend = (rotations - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)  # 0: slowed by factor, 1: kept
    return ((1 - blend) * freqs / rope.factor + blend * freqs).astype(np.float32)


def _yarn(rope: RopeConfig, freqs: np.ndarray) -> np.ndarray:
    """As `_llama3`, but what is blended grows evenly with a pair's index, not with its rotations."""
    num_pairs = len(freqs)

    def pair_that_turns(num_rotations: float) -> float:
        wavelength = rope.original_max_position / num_rotations
        return num_pairs * math.log(wavelength / (2 * math.pi)) / math.log(rope.theta)

    first, last = pair_that_turns(rope.beta_fast), pair_that_turns(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * num_pairs - 1)
    slowed = np.clip((np.arange(num_pairs) - first) / (last - first or 1e-3), 0.0, 1.0)  # 1: by factor, 0: kept
    return (slowed * freqs / rope.factor + (1 - slowed) * freqs).astype(np.float32)


def rotation(positions: jax.Array, freqs: np.ndarray, factor: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """`factor` times (cos, sin), each float32 [..., 1, R/2], of each pair's angle at `positions` int32 [...]."""

    def turns(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        angles = positions[..., None, None].astype(jnp.float32) * freqs
        return factor * jnp.cos(angles), factor * jnp.sin(angles)

    def turns_once(positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        none = jnp.zeros((*positions.shape, 1, len(freqs)), jnp.float32)
        always = jax.lax.optimization_barrier(jnp.asarray(True))
        return jax.lax.cond(always, turns, lambda _: (none, none), positions)

    # XLA:CPU computes cosines anew wherever they are read, for each head of each layer, which in a prompt takes longer
    # than all that is done with them. What a conditional computes it keeps; a barrier is gone before it fuses.
    return jax.lax.platform_dependent(positions, cpu=turns_once, default=turns)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, interleaved: bool = False) -> jax.Array:
    """Turns the pairs of the first R of x [..., heads, H]; computed in float32, returned in x's dtype."""
    rotary_dim = 2 * cos.shape[-1]
    turning, still = x[..., :rotary_dim].astype(jnp.float32), x[..., rotary_dim:]
    if interleaved:
        first, second = turning[..., 0::2], turning[..., 1::2]
    else:
        first, second = jnp.split(turning, 2, axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin]
    joined = jnp.stack(turned, axis=-1).reshape(turning.shape) if interleaved else jnp.concatenate(turned, axis=-1)
    return jnp.concatenate([joined.astype(x.dtype), still], axis=-1)
