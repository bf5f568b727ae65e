"""Normalisation of activations, computed in float32."""

import math

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.param import Axes, param


class RMSNorm(nnx.Module):
    """x / rms(x) * (scale + offset) over the last axes of x, which `axes` names (Zhang, Sennrich, arXiv:1910.07467)."""

    def __init__(self, axes: Axes, *, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs, offset: float = 0.0):
        self.eps = eps
        self.offset = offset
        self.scale = param(axes, dtype, rngs, "ones")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape and dtype."""
        scale = self.scale[...]
        axes = tuple(range(-scale.ndim, 0))
        x32 = x.astype(jnp.float32)
        mean_square = jnp.sum(jnp.square(x32), axis=axes, keepdims=True) / math.prod(scale.shape)
        normal = x32 * jax.lax.rsqrt(mean_square + self.eps)
        return (normal * (self.offset + scale.astype(jnp.float32))).astype(x.dtype)


class LayerNorm(nnx.Module):
    """(x - mean) / deviation * scale + bias over the last axes, (Ba et al. 2016, arXiv:1607.06450)."""

    def __init__(self, axes: Axes, *, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.eps = eps
        self.scale = param(axes, dtype, rngs, "ones")
        self.bias = param(axes, dtype, rngs, "zeros")

    def __call__(self, x: jax.Array) -> jax.Array:
        """Same shape and dtype."""
        axes = tuple(range(-self.scale[...].ndim, 0))
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=axes, keepdims=True)
        variance = jnp.mean(jnp.square(centred), axis=axes, keepdims=True)
        normal = centred * jax.lax.rsqrt(variance + self.eps)
        scale, bias = (p[...].astype(jnp.float32) for p in (self.scale, self.bias))
        return (normal * scale + bias).astype(x.dtype)
