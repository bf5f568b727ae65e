"""Token embedding, which may also serve as the output head, and learned positions."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.layers.param import param
from pallas_kernels.matmul import contract
from sharding_rules import axes as ax


class Embedding(nnx.Module):
    """A table [vocab, embed]: rows in at the bottom; dot products out at the top, if it `is_head`."""

    def __init__(self, vocab_size: int, embed_dim: int, *, is_head: bool, dtype: jnp.dtype, rngs: nnx.Rngs):
        axes = ((ax.VOCAB, vocab_size), (ax.EMBED, embed_dim))
        self.table = param(axes, dtype, rngs, read_share=1.0 if is_head else 0.0)  # 0: but for a few rows

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 [...] -> [..., D]. The host has checked the ids: JAX reads the last row for one beyond the end."""
        return self.table[...][tokens]

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        return contract(hidden, self.table[...], jnp.float32)


class PositionEmbedding(nnx.Module):
    """A table [positions, embed] of learned positions, whose row `first` is that of position 0."""

    def __init__(self, num_rows: int, embed_dim: int, *, first: int, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.first = first
        self.table = param(((ax.POSITIONS, num_rows), (ax.EMBED, embed_dim)), dtype, rngs, read_share=0.0)

    def __call__(self, positions: jax.Array) -> jax.Array:
        """int32 [...] -> [..., D]. Of padding, which may lie beyond the end, it is any row."""
        return self.table[...][positions + self.first]
