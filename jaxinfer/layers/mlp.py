"""Gated feed-forward block (Shazeer 2020, arXiv:2002.05202)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.layers.linear import Linear
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        config: ModelConfig,
        partitioner: Partitioner,
        *,
        mlp_dim: int | None = None,  # None: the config's
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        embed, mlp = ((ax.EMBED, config.embed_dim),), ((ax.MLP, mlp_dim or config.mlp_dim),)
        self.activation = ACTIVATIONS[config.activation]
        self.partitioner = partitioner
        self.gate = Linear(embed, mlp, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.up = Linear(embed, mlp, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp, embed, use_bias=config.mlp_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        hidden = self.activation(self.gate(x)) * self.up(x)
        hidden = self.partitioner.constrain(hidden, (ax.BATCH, None, ax.MLP))
        return self.partitioner.constrain(self.down(hidden), (ax.BATCH, None, ax.EMBED))
