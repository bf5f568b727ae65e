"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.param import param
from sharding_rules import axes as ax


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, size: int, *, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(((ax.EMBED, size),), dtype, rngs, "ones")

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [..., D] -> same shape and dtype."""
        x32 = x.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x32), axis=-1, keepdims=True)
        return (x32 * jax.lax.rsqrt(mean_square + self.eps)).astype(x.dtype) * self.scale[...]
