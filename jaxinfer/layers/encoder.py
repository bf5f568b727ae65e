"""The encoder of BERT (Devlin et al. 2018, arXiv:1810.04805): norms behind each sum, biases everywhere, no cache."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.attention import bidirectional_attention
from jaxinfer.config import EncoderConfig
from jaxinfer.layers.embedding import Embedding, PositionEmbedding
from jaxinfer.layers.linear import Linear
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.norm import LayerNorm
from jaxinfer.layers.param import param
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax


class EncoderAttention(nnx.Module):
    """Projections to heads, attention over the whole text, projection back."""

    def __init__(self, config: EncoderConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        embed = ((ax.EMBED, config.embed_dim),)
        heads = ((ax.HEADS, config.num_q_heads), (ax.HEAD_DIM, config.head_dim))
        self.partitioner = partitioner
        self.scale = config.softmax_scale
        self.q, self.k, self.v = (Linear(embed, heads, use_bias=True, dtype=dtype, rngs=rngs) for _ in range(3))
        self.out = Linear(heads, embed, use_bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """x [B, T, D], lengths int32 [B] -> [B, T, D]."""
        constrain, heads = self.partitioner.constrain, (ax.BATCH, None, ax.HEADS, ax.HEAD_DIM)
        q, k, v = (constrain(project(x), heads) for project in (self.q, self.k, self.v))
        attended = constrain(bidirectional_attention(q, k, v, self.scale, lengths), heads)
        return constrain(self.out(attended), (ax.BATCH, None, ax.EMBED))


class EncoderBlock(nnx.Module):
    """Attention and MLP, each added to what it reads, and the sum normalised."""

    def __init__(self, config: EncoderConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention = EncoderAttention(config, partitioner, dtype=dtype, rngs=rngs)
        self.attention_norm = _norm(config, dtype, rngs)
        kind = {"activation": config.activation, "is_gated": False, "use_bias": True}
        self.mlp = MLP(config.embed_dim, config.mlp_dim, partitioner, **kind, dtype=dtype, rngs=rngs)
        self.mlp_norm = _norm(config, dtype, rngs)

    def __call__(self, x: jax.Array, lengths: jax.Array) -> jax.Array:
        """x [B, T, D], lengths int32 [B] -> [B, T, D]."""
        with jax.named_scope("attention"):
            x = self.attention_norm(x + self.attention(x, lengths))
        with jax.named_scope("mlp"):
            return self.mlp_norm(x + self.mlp(x))


class Encoder(nnx.Module):
    """Token ids of whole texts to the last layer's activations."""

    def __init__(self, config: EncoderConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.partitioner = partitioner
        embed = (ax.EMBED, config.embed_dim)
        self.embedding = Embedding(config.vocab_size, config.embed_dim, is_head=False, dtype=dtype, rngs=rngs)
        self.position_embedding = PositionEmbedding(
            config.max_position, config.embed_dim, first=0, dtype=dtype, rngs=rngs
        )
        self.token_type_embedding = param(((None, config.num_token_types), embed), dtype, rngs, read_share=0.0)
        self.norm = _norm(config, dtype, rngs)
        blocks = [EncoderBlock(config, partitioner, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        self.layers = nnx.List(blocks)

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """tokens int32 [B, T], T at most max_position, and of each row the first `lengths` int32 [B] -> [B, T, D].

        Lengths are at least 1. Behind a row's length stands what counts for nothing.
        """
        with jax.named_scope("embed"):
            x = (
                self.embedding(tokens)
                + self.position_embedding(jnp.arange(tokens.shape[1]))
                + self.token_type_embedding[0]
            )
            x = self.partitioner.constrain(self.norm(x), (ax.BATCH, None, ax.EMBED))
        for layer, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{layer}"):
                x = block(x, lengths)
        return x


def _norm(config: EncoderConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> LayerNorm:
    return LayerNorm(((ax.EMBED, config.embed_dim),), eps=config.norm_eps, dtype=dtype, rngs=rngs)
