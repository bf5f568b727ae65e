"""The decoder that most families are: attention and an MLP in every layer, around a residual stream."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig, RopeConfig
from jaxinfer.layers.attention_block import Attend, AttentionBlock
from jaxinfer.layers.embedding import Embedding, PositionEmbedding
from jaxinfer.layers.latent_attention import LatentAttention
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.moe import MoE, Routing
from jaxinfer.layers.norm import LayerNorm, RMSNorm
from jaxinfer.layers.rope import inverse_frequencies, rotation
from jaxinfer.partitioning import Partitioner
from jaxinfer.pipeline import on_stage
from jaxinfer.stages import Layers, StagePlan
from sharding_rules import axes as ax

Rope = tuple[jax.Array, jax.Array] | None  # as `rope.rotation` makes it; None: nothing rotates


class Block(nnx.Module):
    """Attention and MLP or experts, each added to the residual stream, with norms as the config says."""

    def __init__(
        self, config: ModelConfig, layers: Layers, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        norm = lambda: embed_norm(config, dtype, rngs)  # noqa: E731
        self.attention_norm = norm() if config.norms_before else None
        attention = AttentionBlock if config.latent is None else LatentAttention
        self.attention = attention(config, partitioner, dtype=dtype, rngs=rngs)
        self.attention_post_norm = norm() if config.norms_after else None
        self.mlp_norm = norm() if config.norms_before else None
        self.mlp = _mlp(config, layers, partitioner, dtype, rngs)
        self.mlp_post_norm = norm() if config.norms_after else None

    def __call__(
        self, x: jax.Array, rope: Rope, slot: int, attend: Attend, routing: Routing | None = None
    ) -> jax.Array:
        """[B, T, D] -> the same."""
        with jax.named_scope("attention"):
            added = self.attention(_apply(self.attention_norm, x), rope, slot, attend)
            x = x + _apply(self.attention_post_norm, added)
        with jax.named_scope("mlp"):
            normal = _apply(self.mlp_norm, x)
            added = self.mlp(normal) if isinstance(self.mlp, MLP) else self.mlp(normal, routing, slot)
            return x + _apply(self.mlp_post_norm, added)


class DenseOrExperts(nnx.Module):
    """The MLP of a slot that is dense on some stages of a pipeline and a mixture of experts on others."""

    def __init__(self, has_experts: tuple[bool, ...], dense: MLP, sparse: MoE, partitioner: Partitioner):
        self.has_experts = has_experts
        self.partitioner = partitioner
        self.dense = dense
        self.sparse = sparse

    def __call__(self, x: jax.Array, routing: Routing | None = None, slot: int = 0) -> jax.Array:
        """[B, T, D] -> the same."""

        def compute(has_experts: bool) -> tuple[jax.Array, jax.Array | None]:
            of_stage = routing and routing.fresh()  # what one stage counts must not be seen on another
            out = self.sparse(x, of_stage, slot) if has_experts else self.dense(x)
            # Laid out alike on all stages, or XLA refuses the branch.
            counts = of_stage and self.partitioner.constrain(of_stage.counts(slot), (ax.BATCH, None))
            return self.partitioner.constrain(out, (ax.BATCH, None, ax.EMBED)), counts

        out, counts = on_stage(compute, self.has_experts)
        if routing is not None and counts is not None:
            routing.add_counts(slot, counts)
        return out


class Decoder(nnx.Module):
    """Token ids to the last layer's normalised activations, and those to logits.

    `layers` has those of one stage of a pipeline, in slots as `stages` has them; without stages it has all. A family
    whose layers are others has a subclass with its own `block_type`.
    """

    block_type: type[Any] = Block

    def __init__(self, config: ModelConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.partitioner = partitioner
        tied, size = config.tie_embeddings, (config.vocab_size, config.embed_dim)
        self.embedding = Embedding(*size, is_head=tied, dtype=dtype, rngs=rngs)
        self.position_embedding = _position_embedding(config, dtype, rngs)
        plan = StagePlan.create(config.num_layers, partitioner.axis_size(ax.STAGE))
        self.in_slots = tuple(map(plan.like, range(len(plan.slots))))
        self.is_layer = tuple(tuple(layer is not None for layer in slot) for slot in plan.slots)
        kind = {"dtype": dtype, "rngs": rngs}
        self.layers = nnx.List([self.block_type(config, layers, partitioner, **kind) for layers in self.in_slots])
        self.norm = embed_norm(config, dtype, rngs)
        self.head = None if tied else Embedding(*size, is_head=True, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """tokens, positions int32 [B, T] -> normalised activations [B, T, D]; of a model without stages."""
        return self.finish(self.run_layers(self.embed(tokens, positions), positions, attend))

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """tokens, positions int32 [B, T] -> [B, T, D]."""
        with jax.named_scope("embed"):
            x = self.embedding(tokens)
            if self.config.embed_scale != 1:
                x = x * jnp.asarray(self.config.embed_scale, x.dtype)
            if self.position_embedding is not None:
                x = x + self.position_embedding(positions)
            return self.partitioner.constrain(x, (ax.BATCH, None, ax.EMBED))

    def run_layers(
        self, x: jax.Array, positions: jax.Array, attend: Attend, routing: Routing | None = None
    ) -> jax.Array:
        """x [B, T, D], positions int32 [B, T] -> [B, T, D] behind the layers of a stage.

        Without `routing` all tokens are real.
        """

        configs = [[self.config.layer_rope(layer) for layer in layers] for layers in self.in_slots]
        ropes = {
            rope: self._rotation(rope, positions) for rope in dict.fromkeys(itertools.chain.from_iterable(configs))
        }
        for slot, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{slot}"):
                routed = () if routing is None else (routing.where(on_stage(jnp.asarray, self.is_layer[slot])),)
                x = block(x, on_stage(ropes.__getitem__, configs[slot]), slot, attend, *routed)
        return x

    def finish(self, x: jax.Array) -> jax.Array:
        """[B, T, D] behind the last layer -> the same, normalised."""
        return self.norm(x)

    def _rotation(self, rope: RopeConfig | None, positions: jax.Array) -> Rope:
        if rope is None:
            return None
        return rotation(positions, inverse_frequencies(rope, self.config.rotary_head_dim), rope.attention_factor)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        with jax.named_scope("head"):
            logits, cap = (self.head or self.embedding).logits(hidden), self.config.logits_soft_cap
            return logits if cap is None else cap * jnp.tanh(logits / cap)


def embed_norm(config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> RMSNorm | LayerNorm:
    """Of the residual stream."""
    axes = ((ax.EMBED, config.embed_dim),)
    kinds = {"rms": functools.partial(RMSNorm, offset=config.norm_offset), "layer": LayerNorm}
    return kinds[config.norm](axes, eps=config.norm_eps, dtype=dtype, rngs=rngs)


def _position_embedding(config: ModelConfig, dtype: jnp.dtype, rngs: nnx.Rngs) -> PositionEmbedding | None:
    num_rows = config.learned_positions
    if num_rows is None:
        return None
    first = num_rows - config.max_position
    return PositionEmbedding(num_rows, config.embed_dim, first=first, dtype=dtype, rngs=rngs)


def _mlp(
    config: ModelConfig, layers: Layers, partitioner: Partitioner, dtype: jnp.dtype, rngs: nnx.Rngs
) -> MLP | MoE | DenseOrExperts:
    def dense() -> MLP:
        kind = {"activation": config.activation, "is_gated": config.gated_mlp, "use_bias": config.mlp_bias}
        return MLP(config.embed_dim, config.mlp_dim, partitioner, **kind, dtype=dtype, rngs=rngs)

    has_experts = tuple(map(config.has_experts, layers))

    def experts() -> MoE:
        first = layers[has_experts.index(True)]  # stands in where a stage's layer is dense, and does not ask
        with_experts = tuple(layer if has else first for layer, has in zip(layers, has_experts, strict=True))
        return MoE(config, with_experts, partitioner, dtype=dtype, rngs=rngs)

    if len(set(has_experts)) > 1:
        return DenseOrExperts(has_experts, dense(), experts(), partitioner)
    return experts() if has_experts[0] else dense()


def _apply(norm: RMSNorm | LayerNorm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)
