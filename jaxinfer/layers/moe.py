"""A mixture of experts: each token goes through the few MLPs that a router picks (Shazeer et al., arXiv:1701.06538)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxinfer.config import ModelConfig, MoEConfig
from jaxinfer.layers.experts import ClampedExperts, GatedExperts
from jaxinfer.layers.mlp import MLP
from jaxinfer.layers.param import param
from jaxinfer.partitioning import Partitioner
from jaxinfer.stages import Layers
from pallas_kernels.matmul import contract
from sharding_rules import axes as ax

_TINY = 1e-20  # so that weights that are all zero stay so


class Routing:
    """Which of a step's tokens are real, and how many of them each expert gets.

    An object of the trace: each slot for layers (`stages`) adds its own.
    """

    def __init__(self, is_valid: jax.Array, num_experts: int, counts: dict[int, jax.Array] | None = None):
        self.is_valid = is_valid  # bool [B, T]
        self._num_experts = num_experts
        self._counts: dict[int, jax.Array] = {} if counts is None else counts

    def add(self, slot: int, experts: jax.Array) -> None:
        """Those of a slot, int32 [B, T, k], of which the real tokens' count."""
        is_picked = self.is_valid[..., None, None] & (experts[..., None] == jnp.arange(self._num_experts))
        self._counts[slot] = jnp.sum(is_picked, axis=(1, 2), dtype=jnp.int32)

    def add_counts(self, slot: int, counts: jax.Array) -> None:
        """int32 [B, E]."""
        self._counts[slot] = counts

    def counts(self, slot: int) -> jax.Array:
        """int32 [B, E]; zero of a slot without experts."""
        none = jnp.zeros((len(self.is_valid), self._num_experts), jnp.int32)
        return self._counts.get(slot, none)

    def where(self, condition: jax.Array) -> "Routing":
        """Of the same tokens, none of which is real unless bool [] `condition` is; counted with them."""
        return Routing(self.is_valid & condition, self._num_experts, self._counts)

    def fresh(self) -> "Routing":
        """Of the same tokens, with nothing counted."""
        return Routing(self.is_valid, self._num_experts)


class MoE(nnx.Module):
    """The sum of a token's experts, each by its weight, and of the shared ones, through which every token goes."""

    def __init__(
        self, config: ModelConfig, layers: Layers, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        assert config.moe is not None
        moe = config.moe
        self.router = Router(moe, config.embed_dim, partitioner, dtype=dtype, rngs=rngs)
        kind = GatedExperts if moe.swiglu_limit is None else ClampedExperts
        self.experts = kind(config, layers, partitioner, dtype=dtype, rngs=rngs)
        shared = {"activation": config.activation, "is_gated": True, "use_bias": config.mlp_bias}
        sizes = (config.embed_dim, moe.shared_mlp_dim)
        self.shared = MLP(*sizes, partitioner, **shared, dtype=dtype, rngs=rngs) if moe.shared_mlp_dim else None

    def __call__(self, x: jax.Array, routing: Routing | None = None, slot: int = 0) -> jax.Array:
        """x [B, T, D] -> [B, T, D]. Without `routing` all tokens are real."""
        experts, weights = self.router(x)
        if routing is not None:
            routing.add(slot, experts)
        out = self.experts(x, experts, weights, None if routing is None else routing.is_valid)
        return out if self.shared is None else out + self.shared(x)


class Router(nnx.Module):
    """Picks experts, in float32.

    With groups (DeepSeek-V2, arXiv:2405.04434) only the experts of the best groups count. `choice_bias` (DeepSeek-V3,
    arXiv:2412.19437) is added to the scores by which experts are picked, and not to those that weigh them.
    """

    def __init__(self, moe: MoEConfig, embed_dim: int, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        # Without the name of the experts' axis: every device picks for its own tokens among all.
        self.moe, self.partitioner = moe, partitioner
        self.weight = param(((None, moe.num_experts), (ax.EMBED, embed_dim)), dtype, rngs)
        self.bias = param(((None, moe.num_experts),), dtype, rngs, "zeros") if moe.router_bias else None
        # Never rounded: it decides between scores that are close.
        self.choice_bias = (
            param(((None, moe.num_experts),), jnp.dtype("float32"), rngs, "zeros") if moe.choice_bias else None
        )

    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """x [..., D] -> experts int32 [..., k] and their weights float32 [..., k]."""
        logits = contract(x, self.weight[...], jnp.float32)
        if self.bias is not None:
            logits += self.bias[...].astype(jnp.float32)
        tokens, whole = self.partitioner.spec((ax.BATCH,)), self.partitioner.spec(())
        pick = self.partitioner.shard_map(self._pick, in_specs=(tokens, whole), out_specs=(tokens, tokens))
        return pick(logits, None if self.choice_bias is None else self.choice_bias[...])

    def _pick(self, logits: jax.Array, choice_bias: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        """In each data shard by itself: XLA would gather the tokens of all for a top-k."""
        scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[self.moe.scoring](logits)
        choice = scores if choice_bias is None else scores + choice_bias
        _, experts = lax.top_k(self._of_best_groups(choice), self.moe.num_experts_per_token)
        weights = jnp.take_along_axis(scores, experts, axis=-1)
        if self.moe.normalize:
            weights /= jnp.sum(weights, axis=-1, keepdims=True) + _TINY
        return experts, weights * self.moe.scale

    def _of_best_groups(self, scores: jax.Array) -> jax.Array:
        """float32 [..., E], -inf outside of the best groups: those whose best experts' scores have the largest sum."""
        if self.moe.num_groups == 1:
            return scores
        grouped = scores.reshape(*scores.shape[:-1], self.moe.num_groups, -1)
        of_group = jnp.sum(lax.top_k(grouped, self.moe.experts_per_group_score)[0], axis=-1)
        _, best = lax.top_k(of_group, self.moe.groups_per_token)
        is_best = jnp.any(best[..., None] == jnp.arange(self.moe.num_groups), axis=-2)
        return jnp.where(is_best[..., None], grouped, -jnp.inf).reshape(scores.shape)
