"""Feed-forward block, plain or gated (Shazeer 2020, arXiv:2002.05202)."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.linear import Linear, apply_each
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax

_gelu_tanh = functools.partial(jax.nn.gelu, approximate=True)
ACTIVATIONS = {
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


class MLP(nnx.Module):
    """down(activation(gate(x)) * up(x)), or down(activation(up(x))) where it is not gated."""

    def __init__(
        self,
        embed_dim: int,
        mlp_dim: int,
        partitioner: Partitioner,
        *,
        activation: str,
        is_gated: bool,
        use_bias: bool,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ):
        embed, mlp = ((ax.EMBED, embed_dim),), ((ax.MLP, mlp_dim),)
        self.activation = ACTIVATIONS[activation]
        self.partitioner = partitioner
        linear = functools.partial(Linear, use_bias=use_bias, dtype=dtype, rngs=rngs)
        self.gate = linear(embed, mlp) if is_gated else None
        self.up = linear(embed, mlp)
        self.down = linear(mlp, embed)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        if self.gate is None:
            hidden = self.activation(self.up(x))
        else:
            gate, up = apply_each([self.gate, self.up], x)
            hidden = self.activation(gate) * up
        hidden = self.partitioner.constrain(hidden, (ax.BATCH, None, ax.MLP))
        return self.partitioner.constrain(self.down(hidden), (ax.BATCH, None, ax.EMBED))
