"""Grouped-query attention, with rotary positions or none: the projections around whatever attends."""

from typing import Protocol

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.layers.linear import Linear, apply_each
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.param import param
from jaxinfer.layers.rope import rotate
from jaxinfer.layouts import num_sharded_kv_heads
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax


class Attend(Protocol):
    """Where keys and values are kept, and on which devices, is its business: a model never learns it."""

    def __call__(
        self, slot: int, q: jax.Array, k: jax.Array, v: jax.Array | None, *, sinks: jax.Array | None = None
    ) -> jax.Array:
        """q [B, T, N, H], k and v [B, T, K, H], sinks [N] -> [B, T, N, H].

        Without v the values are the first of the keys' numbers, as many as the model's config says.
        """
        ...


class AttentionBlock(nnx.Module):
    """Projections to heads, normalisation, rotation, attention, projection back."""

    def __init__(self, config: ModelConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        embed = ((ax.EMBED, config.embed_dim),)
        heads = ((ax.HEADS, config.num_q_heads), (ax.HEAD_DIM, config.head_dim))
        num_kv_heads = num_sharded_kv_heads(config.num_kv_heads, partitioner)
        kv_heads = ((ax.KV_HEADS, num_kv_heads), (ax.HEAD_DIM, config.head_dim))
        self.partitioner = partitioner
        self.is_interleaved = config.rope is not None and config.rope.interleaved
        self.q = Linear(embed, heads, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.k = Linear(embed, kv_heads, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.v = Linear(embed, kv_heads, use_bias=config.attention_bias, dtype=dtype, rngs=rngs)
        self.out = Linear(heads, embed, use_bias=config.attention_out_bias, dtype=dtype, rngs=rngs)
        self.q_norm = _qk_norm(config, heads, dtype, rngs)
        self.k_norm = _qk_norm(config, kv_heads, dtype, rngs)
        self.sinks = param(heads[:1], dtype, rngs) if config.attention_sinks else None

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array] | None, slot: int, attend: Attend) -> jax.Array:
        """x [B, T, D], rope as `rope.rotation` makes it, or None to rotate nothing -> [B, T, D]."""
        constrain = self.partitioner.constrain
        q, k, v = apply_each([self.q, self.k, self.v], x)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (rotate(heads, *rope, interleaved=self.is_interleaved) for heads in (q, k))
        q = constrain(q, (ax.BATCH, None, ax.HEADS, ax.HEAD_DIM))
        k, v = (constrain(heads, (ax.BATCH, None, ax.KV_HEADS, ax.HEAD_DIM)) for heads in (k, v))
        sinks = {} if self.sinks is None else {"sinks": self.sinks[...]}
        return constrain(self.out(attend(slot, q, k, v, **sinks)), (ax.BATCH, None, ax.EMBED))


def _qk_norm(config: ModelConfig, heads: tuple[tuple[str, int], ...], dtype: jnp.dtype, rngs: nnx.Rngs):
    if not config.qk_norm:
        return None
    axes = {"head": heads[1:], "all": heads}[config.qk_norm]
    return RMSNorm(axes, eps=config.norm_eps, dtype=dtype, rngs=rngs, offset=config.norm_offset)
