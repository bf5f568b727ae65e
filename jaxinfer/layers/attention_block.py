"""Grouped-query attention with rotary positions: the projections around whatever attends."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.rope import rotate
from jaxinfer.partitioning import Partitioner, num_sharded_kv_heads
from sharding_rules import axes as ax

# attend(layer, q [B,T,N,H], k [B,T,K,H], v [B,T,K,H]) -> [B,T,N,H]. Where keys and values are kept,
# and on which devices, is the callable's business: a model never learns it.
Attend = Callable[[int, jax.Array, jax.Array, jax.Array], jax.Array]


class AttentionBlock(nnx.Module):
    """Projections to heads, rotation, attention, projection back."""

    def __init__(self, config: ModelConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        embed = ((ax.EMBED, config.embed_dim),)
        heads = ((ax.HEADS, config.num_q_heads), (ax.HEAD_DIM, config.head_dim))
        num_kv_heads = num_sharded_kv_heads(config.num_kv_heads, partitioner)
        kv_heads = ((ax.KV_HEADS, num_kv_heads), (ax.HEAD_DIM, config.head_dim))
        self.partitioner = partitioner
        self.q = Linear(embed, heads, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.k = Linear(embed, kv_heads, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(embed, kv_heads, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(heads, embed, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], layer: int, attend: Attend) -> jax.Array:
        """x [B, T, D], rope as `rope.rotation` makes it -> [B, T, D]."""
        constrain = self.partitioner.constrain
        q = constrain(rotate(self.q(x), *rope), (ax.BATCH, None, ax.HEADS, ax.HEAD_DIM))
        k = constrain(rotate(self.k(x), *rope), (ax.BATCH, None, ax.KV_HEADS, ax.HEAD_DIM))
        v = constrain(self.v(x), (ax.BATCH, None, ax.KV_HEADS, ax.HEAD_DIM))
        return constrain(self.out(attend(layer, q, k, v)), (ax.BATCH, None, ax.EMBED))
