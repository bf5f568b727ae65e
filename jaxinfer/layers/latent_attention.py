"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434), computed among the latents that the cache holds.

Of each token the cache has one latent and one rotated key, which all heads share: keys[n] = key_up[n] @ latent,
values[n] = value_up[n] @ latent. Neither is ever computed. A query meets the latents themselves after key_up has been
moved to its side, <q, key_up @ latent> = <key_up.T @ q, latent>, and value_up comes after the sum over tokens. So to
the cache this is one KV head, whose key is latent and rotated key in a row, and whose value is the latent.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.layers.attention_block import Attend
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.param import Axes, param
from jaxinfer.layers.rope import rotate
from jaxinfer.layouts import num_sharded_kv_heads
from jaxinfer.partitioning import Partitioner
from pallas_kernels.precision import matmul_precision
from sharding_rules import axes as ax

_NORM_EPS = 1e-6  # of latents, whatever the model's other norms have


class LatentAttention(nnx.Module):
    """Down to latents, up to heads, rotation, attention, projection back."""

    def __init__(self, config: ModelConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        assert config.latent is not None
        latent, embed = config.latent, ((ax.EMBED, config.embed_dim),)
        self.latent, self.partitioner = latent, partitioner
        self.num_kv_heads = num_sharded_kv_heads(config.num_kv_heads, partitioner)
        self.is_interleaved = config.rope is not None and config.rope.interleaved

        def linear(inputs: Axes, outputs: Axes, *, use_bias: bool = False) -> Linear:
            return Linear(inputs, outputs, use_bias=use_bias, dtype=dtype, rngs=rngs)

        def norm(rank: int) -> RMSNorm:
            return RMSNorm(((ax.LATENT, rank),), eps=_NORM_EPS, dtype=dtype, rngs=rngs)

        heads = (ax.HEADS, config.num_q_heads)
        q_heads = (heads, (ax.HEAD_DIM, latent.key_dim + latent.rope_dim))
        q_latent = ((ax.LATENT, latent.q_rank),) if latent.q_rank else None
        self.q_down = linear(embed, q_latent, use_bias=config.attention_bias) if q_latent else None
        self.q_norm = norm(latent.q_rank) if latent.q_rank else None
        self.q = linear(q_latent or embed, q_heads)
        kv_latent = ((ax.LATENT, latent.kv_rank + latent.rope_dim),)
        self.kv_down = linear(embed, kv_latent, use_bias=config.attention_bias)
        self.kv_norm = norm(latent.kv_rank)
        # Of each head the rows that make keys, then those that make values.
        kv_up = (heads, (ax.HEAD_DIM, latent.key_dim + latent.value_dim), (ax.LATENT, latent.kv_rank))
        self.kv_up = param(kv_up, dtype, rngs)
        self.out = linear((heads, (ax.HEAD_DIM, latent.value_dim)), embed, use_bias=config.attention_out_bias)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array] | None, slot: int, attend: Attend) -> jax.Array:
        """x [B, T, D], rope as `rope.rotation` makes it -> [B, T, D]."""
        assert rope is not None
        constrain, latent, precision = self.partitioner.constrain, self.latent, matmul_precision(x.dtype)
        key_up, value_up = jnp.split(self.kv_up[...], [latent.key_dim], axis=1)  # [N, H, R]
        down = x if self.q_down is None or self.q_norm is None else self.q_norm(self.q_down(x))
        q, q_turning = jnp.split(self.q(down), [latent.key_dim], axis=-1)
        q = jnp.einsum("btnh,nhr->btnr", q, key_up, precision=precision)
        kv, k_turning = jnp.split(self.kv_down(x)[..., None, :], [latent.kv_rank], axis=-1)  # [B, T, 1, R]
        q_turned, k_turned = (rotate(heads, *rope, interleaved=self.is_interleaved) for heads in (q_turning, k_turning))
        q = constrain(jnp.concatenate([q, q_turned], axis=-1), (ax.BATCH, None, ax.HEADS, ax.HEAD_DIM))
        k = jnp.concatenate([self.kv_norm(kv), k_turned], axis=-1)
        k = jnp.broadcast_to(k, (*k.shape[:2], self.num_kv_heads, k.shape[-1]))
        k = constrain(k, (ax.BATCH, None, ax.KV_HEADS, ax.HEAD_DIM))
        summed = attend(slot, q, k, None)
        values = jnp.einsum("btnr,nhr->btnh", summed, value_up, precision=precision)
        return constrain(self.out(values), (ax.BATCH, None, ax.EMBED))
