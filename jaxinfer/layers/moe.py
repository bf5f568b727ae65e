"""A mixture of experts: each token goes through the few MLPs that a router picks (Shazeer et al., arXiv:1701.06538)."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from jaxinfer.config import ModelConfig, MoEConfig
from jaxinfer.layers.mlp import ACTIVATIONS, MLP
from jaxinfer.layers.param import param
from jaxinfer.partitioning import Partitioner
from pallas_kernels.grouped_map.xla import grouped_map
from pallas_kernels.matmul import contract
from sharding_rules import axes as ax

_TINY = 1e-20  # so that weights that are all zero stay so


class MoE(nnx.Module):
    """The sum of a token's experts, each by its weight, and of the shared ones, through which every token goes."""

    def __init__(self, config: ModelConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        assert config.moe is not None
        moe = config.moe
        self.router = Router(moe, config.embed_dim, dtype=dtype, rngs=rngs)
        kind = GatedExperts if moe.swiglu_limit is None else ClampedExperts
        self.experts = kind(config, moe, partitioner, dtype=dtype, rngs=rngs)
        shared = {"activation": config.activation, "is_gated": True, "use_bias": config.mlp_bias}
        sizes = (config.embed_dim, moe.shared_mlp_dim)
        self.shared = MLP(*sizes, partitioner, **shared, dtype=dtype, rngs=rngs) if moe.shared_mlp_dim else None

    def __call__(self, x: jax.Array) -> jax.Array:
        """x [B, T, D] -> [B, T, D]."""
        out = self.experts(x, *self.router(x))
        return out if self.shared is None else out + self.shared(x)


class Router(nnx.Module):
    """Picks experts, in float32.

    With groups (DeepSeek-V2, arXiv:2405.04434) only the experts of the best groups count. `choice_bias` (DeepSeek-V3,
    arXiv:2412.19437) is added to the scores by which experts are picked, and not to those that weigh them.
    """

    def __init__(self, moe: MoEConfig, embed_dim: int, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        # Without the name of the experts' axis: every device picks for its own tokens among all.
        self.moe = moe
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
        scores = {"softmax": jax.nn.softmax, "sigmoid": jax.nn.sigmoid}[self.moe.scoring](logits)
        choice = scores if self.choice_bias is None else scores + self.choice_bias[...]
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


class Experts(nnx.Module):
    """What experts of all kinds have in common: weights of all lie in one array, [experts, embed, mlp] and the like.

    A device computes what its experts, and its parts of them, add to each token that it has; the sum over devices is
    one all-reduce. No token is dropped, however many pick the same expert.
    """

    def __init__(self, partitioner: Partitioner):
        self.partitioner = partitioner

    def __call__(self, x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        """x [B, T, D], experts int32 and weights float32 [B, T, k] -> [B, T, D]."""
        params = {name: (p[...], p.get_metadata("logical_axes")) for name, p in self._params().items()}
        arrays, axes = ({name: pair[i] for name, pair in params.items()} for i in (0, 1))
        spec = self.partitioner.spec
        tokens = spec((ax.BATCH, None, None))
        in_specs = (tokens, tokens, tokens, {name: spec(of) for name, of in axes.items()})
        compute = self.partitioner.shard_map(self._compute_local, in_specs=in_specs, out_specs=tokens)
        return compute(x, experts, weights, arrays)

    def _params(self) -> dict[str, nnx.Param]:
        """Of all experts, "down" among them."""
        raise NotImplementedError

    def _expert(self, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """One expert's part of [rows, D] -> [rows, D], to be summed over the devices that have the others."""
        raise NotImplementedError

    def _compute_local(self, x, experts, weights, params):
        """Tokens sorted by expert, so that those of an expert are rows of one product."""
        num_local, k = params["down"].shape[0], experts.shape[-1]
        local = experts.reshape(-1) - self._first_expert(num_local)
        is_here = (local >= 0) & (local < num_local)
        local = jnp.where(is_here, local, num_local)  # behind all that are computed
        order = jnp.argsort(local)
        sizes = jnp.sum(local[:, None] == jnp.arange(num_local), axis=0, dtype=jnp.int32)
        rows = x.reshape(-1, x.shape[-1])[order // k]
        out = grouped_map(self._expert, params, rows, sizes)[jnp.argsort(order)].astype(jnp.float32)
        out = jnp.where(is_here[:, None], out, 0) * weights.reshape(-1, 1)
        out = jnp.sum(out.reshape(-1, k, x.shape[-1]), axis=1).astype(x.dtype).reshape(x.shape)
        split = (*self._mesh_axes(ax.EXPERTS), *self._mesh_axes(ax.EXPERT_MLP))
        return lax.psum(out, split) if split else out

    def _first_expert(self, num_local: int) -> jax.Array | int:
        axes = self._mesh_axes(ax.EXPERTS)
        return lax.axis_index(axes) * num_local if axes else 0

    def _mesh_axes(self, logical_axis: str) -> tuple[str, ...]:
        """Those that split it; none on a single device, where nothing is mapped over the mesh."""
        return self.partitioner.mesh_axes(logical_axis) if self.partitioner.mesh.size > 1 else ()


class GatedExperts(Experts):
    """Each down(activation(gate(x)) * up(x))."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(partitioner)
        experts, embed, mlp = (ax.EXPERTS, moe.num_experts), (ax.EMBED, config.embed_dim), (ax.EXPERT_MLP, moe.mlp_dim)
        share = moe.num_experts_per_token / moe.num_experts
        self.activation = ACTIVATIONS[config.activation]
        self.gate = param((experts, mlp, embed), dtype, rngs, read_share=share)
        self.up = param((experts, mlp, embed), dtype, rngs, read_share=share)
        self.down = param((experts, embed, mlp), dtype, rngs, read_share=share)

    def _params(self) -> dict[str, nnx.Param]:
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def _expert(self, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        hidden = self.activation(contract(x, params["gate"])) * contract(x, params["up"])
        return contract(hidden, params["down"])


class ClampedExperts(Experts):
    """gpt-oss' (arXiv:2508.10925), each down(`clamped_swiglu`(gate(x), up(x))), with biases.

    Gate and up are one array, a hidden unit's two rows neighbours, as in the checkpoint: so a mesh splits whole pairs.
    """

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(partitioner)
        experts, embed, mlp = (ax.EXPERTS, moe.num_experts), (ax.EMBED, config.embed_dim), (ax.EXPERT_MLP, moe.mlp_dim)
        share = moe.num_experts_per_token / moe.num_experts
        self.moe = moe
        self.gate_up = param((experts, mlp, (None, 2), embed), dtype, rngs, read_share=share)
        self.gate_up_bias = param((experts, mlp, (None, 2)), dtype, rngs, "zeros", read_share=share)
        self.down = param((experts, embed, mlp), dtype, rngs, read_share=share)
        self.down_bias = param((experts, embed), dtype, rngs, "zeros", read_share=share)

    def _params(self) -> dict[str, nnx.Param]:
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        return {"gate_up": self.gate_up, "down": self.down} | biases

    def _expert(self, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        bias = params["gate_up_bias"]  # [F, 2]
        pairs = contract(x, params["gate_up"].reshape(bias.size, -1)).reshape(-1, *bias.shape) + bias
        assert self.moe.swiglu_limit is not None
        hidden = clamped_swiglu(pairs[..., 0], pairs[..., 1], self.moe.swiglu_alpha, self.moe.swiglu_limit)
        return contract(hidden, params["down"]) + self._on_one_device(params["down_bias"])

    def _on_one_device(self, bias: jax.Array) -> jax.Array:
        """Of those that split the hidden units, and whose parts are summed; zero on the others."""
        axes = self._mesh_axes(ax.EXPERT_MLP)
        return jnp.where(lax.axis_index(axes) == 0, bias, 0) if axes else bias


def clamped_swiglu(gate: jax.Array, up: jax.Array, alpha: float, limit: float) -> jax.Array:
    """(up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within it: gpt-oss' (arXiv:2508.10925)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)
