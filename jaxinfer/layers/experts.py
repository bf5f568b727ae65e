"""The experts of a mixture, of which each token goes through a few, wherever a mesh has them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from jaxinfer.config import ModelConfig
from jaxinfer.layers import expert_exchange
from jaxinfer.layers.mlp import ACTIVATIONS
from jaxinfer.layers.param import Axes, param
from jaxinfer.layouts import AxisSplits
from jaxinfer.partitioning import Partitioner
from jaxinfer.pipeline import on_stage
from jaxinfer.stages import Layers
from pallas_kernels import grouped_matmul
from pallas_kernels.grouped_matmul import Product
from sharding_rules import axes as ax


class Experts(nnx.Module):
    """What experts of all kinds have in common: weights of all lie in one array, [slots, mlp, embed] and the like.

    A slot holds one expert; the tokens of one that is in several take turns. Where the rules split tokens over the
    mesh axis that experts are split over, a token travels to the devices that have its experts, and its results back.
    Else a device computes what its experts add to each token, and the sum over devices is one all-reduce. In both a
    device that has a part of an expert computes a part of its result, and these are summed likewise. No token is
    dropped, however many pick the same expert.
    """

    def __init__(self, config: ModelConfig, layers: Layers, partitioner: Partitioner):
        assert config.moe is not None
        self.moe = moe = config.moe
        self.partitioner = partitioner
        self.placements = tuple(map(moe.placement, layers))  # on each stage of a pipeline
        self.placement = self.placements[0]
        if len({*map(len, self.placements)}) > 1:
            numbers = ", ".join(f"layer {n} has {len(of)}" for n, of in zip(layers, self.placements, strict=True))
            raise ValueError(f"--expert_placement: {numbers} slots; pipeline stages need equally many")
        self._share = moe.num_experts_per_token / len(self.placement)
        is_exchanged(partitioner)  # refuses rules that are neither of the two

    def __call__(
        self, x: jax.Array, experts: jax.Array, weights: jax.Array, is_valid: jax.Array | None = None
    ) -> jax.Array:
        """x [B, T, D], experts int32 and weights float32 [B, T, k] -> [B, T, D].

        Nothing is computed for a token where bool [B, T] `is_valid` is false.
        """
        slots = self._slots(experts)
        if is_valid is not None:
            slots = jnp.where(is_valid[..., None], slots, len(self.placement))
        params = {name: (p[...], p.get_metadata("logical_axes")) for name, p in self._params().items()}
        arrays, axes = ({name: pair[i] for name, pair in params.items()} for i in (0, 1))
        spec = self.partitioner.spec
        tokens = spec((ax.BATCH, None, None))
        in_specs = (tokens, tokens, tokens, {name: spec(of) for name, of in axes.items()})
        compute = self.partitioner.shard_map(self._compute_local, in_specs=in_specs, out_specs=tokens)
        return compute(x, slots, weights, arrays)

    def _params(self) -> dict[str, nnx.Param]:
        """Of all experts, "down" among them."""
        raise NotImplementedError

    def _expert(self, product: Product, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        """Experts' part of [rows, D] -> [rows, D], to be summed over the devices that have the others."""
        raise NotImplementedError

    def _param(self, axes: Axes, dtype: jnp.dtype, rngs: nnx.Rngs, init: str = "normal") -> nnx.Param:
        """Of all slots; `axes` are one's."""
        axes = ((ax.EXPERTS, len(self.placement)), *axes)
        return param(axes, dtype, rngs, init, read_share=self._share, placement=self.placement)

    def _slots(self, experts: jax.Array) -> jax.Array:
        """int32 [B, T, k] of the same, in turn where an expert has several: by the token's place, not by others'."""
        return on_stage(lambda placement: _slots_of(experts, placement, self.moe.num_experts), self.placements)

    def _compute_local(self, x, slots, weights, params):
        """One device's part of its tokens' sums, each in float32 and in the order of the token's experts."""
        num_local, k, size = params["down"].shape[0], slots.shape[-1], x.shape[-1]
        tokens, slots, axes = x.reshape(-1, size), slots.reshape(-1, k), self._mesh_axes(ax.EXPERTS)
        compute = functools.partial(self._compute_rows, params, expected_rows(slots.size, self.partitioner))
        if is_exchanged(self.partitioner):
            devices = {"num_local": num_local, "num_devices": len(self.placement) // num_local, "axes": axes}
            out, summed = expert_exchange.map_on_owners(compute, tokens, slots, **devices), ()
        else:
            local = slots - (lax.axis_index(axes) * num_local if axes else 0)
            out = compute(tokens, jnp.where((local >= 0) & (local < num_local), local, num_local))
            summed = axes
        out = out.astype(jnp.float32) * weights.reshape(-1, k, 1)
        out = jnp.sum(out, axis=1).astype(x.dtype).reshape(x.shape)
        summed = (*summed, *self._mesh_axes(ax.EXPERT_MLP))
        return lax.psum(out, summed) if summed else out

    def _compute_rows(self, params: dict[str, jax.Array], num_expected: int, x: jax.Array, slots: jax.Array):
        """x [S, D] and this device's slots int32 [S, k] -> [S, k, D]; zero where the slot is one behind its last.

        Rows are sorted by slot, so that those of an expert are rows of one product.
        """
        num_local, k = params["down"].shape[0], slots.shape[-1]
        of_rows = slots.reshape(-1)
        order = jnp.argsort(of_rows)
        sizes = jnp.sum(of_rows[:, None] == jnp.arange(num_local), axis=0, dtype=jnp.int32)
        backend = grouped_matmul.backend(self.moe.backend)
        out = backend.grouped_map(self._expert, params, x[order // k], sizes, num_expected)[jnp.argsort(order)]
        return jnp.where((of_rows < num_local)[:, None], out, 0).reshape(*slots.shape, -1)

    def _mesh_axes(self, logical_axis: str) -> tuple[str, ...]:
        """Those that split it; none on a single device, where nothing is mapped over the mesh."""
        return self.partitioner.mesh_axes(logical_axis) if self.partitioner.mesh.size > 1 else ()


def _slots_of(experts: jax.Array, placement: tuple[int, ...], num_experts: int) -> jax.Array:
    if placement == tuple(range(num_experts)):
        return experts
    copies = [np.flatnonzero(np.equal(placement, expert)) for expert in range(num_experts)]
    num_copies = jnp.asarray([*map(len, copies)], jnp.int32)
    slots = jnp.asarray([np.resize(of_expert, max(map(len, copies))) for of_expert in copies], jnp.int32)
    num_shards, num_tokens, _ = experts.shape
    turn = jnp.arange(num_shards, dtype=jnp.int32)[:, None] + jnp.arange(num_tokens, dtype=jnp.int32)
    return slots[experts, turn[..., None] % num_copies[experts]]


class GatedExperts(Experts):
    """Each down(activation(gate(x)) * up(x))."""

    def __init__(
        self, config: ModelConfig, layers: Layers, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(config, layers, partitioner)
        embed, mlp = (ax.EMBED, config.embed_dim), (ax.EXPERT_MLP, self.moe.mlp_dim)
        self.activation = ACTIVATIONS[config.activation]
        self.gate = self._param((mlp, embed), dtype, rngs)
        self.up = self._param((mlp, embed), dtype, rngs)
        self.down = self._param((embed, mlp), dtype, rngs)

    def _params(self) -> dict[str, nnx.Param]:
        return {"gate": self.gate, "up": self.up, "down": self.down}

    def _expert(self, product: Product, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        hidden = self.activation(product(x, params["gate"])) * product(x, params["up"])
        return product(hidden, params["down"])


class ClampedExperts(Experts):
    """gpt-oss' (arXiv:2508.10925), each down(`clamped_swiglu`(gate(x), up(x))), with biases.

    Gate and up are one array, a hidden unit's two rows neighbours, as in the checkpoint: so a mesh splits whole pairs.
    """

    def __init__(
        self, config: ModelConfig, layers: Layers, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        super().__init__(config, layers, partitioner)
        embed, mlp = (ax.EMBED, config.embed_dim), (ax.EXPERT_MLP, self.moe.mlp_dim)
        self.gate_up = self._param((mlp, (None, 2), embed), dtype, rngs)
        self.gate_up_bias = self._param((mlp, (None, 2)), dtype, rngs, "zeros")
        self.down = self._param((embed, mlp), dtype, rngs)
        self.down_bias = self._param((embed,), dtype, rngs, "zeros")

    def _params(self) -> dict[str, nnx.Param]:
        biases = {"gate_up_bias": self.gate_up_bias, "down_bias": self.down_bias}
        return {"gate_up": self.gate_up, "down": self.down} | biases

    def _expert(self, product: Product, params: dict[str, jax.Array], x: jax.Array) -> jax.Array:
        pairs = product(x, params["gate_up"], params["gate_up_bias"])  # [rows, F, 2]
        assert self.moe.swiglu_limit is not None
        hidden = clamped_swiglu(pairs[..., 0], pairs[..., 1], self.moe.swiglu_alpha, self.moe.swiglu_limit)
        return product(hidden, params["down"], self._on_one_device(params["down_bias"]))

    def _on_one_device(self, bias: jax.Array) -> jax.Array:
        """Of those that split the hidden units, and whose parts are summed; zero on the others."""
        axes = self._mesh_axes(ax.EXPERT_MLP)
        return jnp.where(lax.axis_index(axes) == 0, bias, 0) if axes else bias


def clamped_swiglu(gate: jax.Array, up: jax.Array, alpha: float, limit: float) -> jax.Array:
    """(up + 1) * gate * sigmoid(alpha * gate), gate at most `limit` and up within it: gpt-oss' (arXiv:2508.10925)."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(alpha * gate)


def expected_rows(num_routed: int, splits: AxisSplits) -> int:
    """Rows that a device computes, were all devices' alike, of `num_routed` that its tokens are routed to."""
    return num_routed if is_exchanged(splits) else -(-num_routed // splits.num_shards(ax.EXPERTS))


def is_exchanged(splits: AxisSplits) -> bool:
    """Whether the devices among which the experts are split have different tokens.

    Raises ValueError for rules by which only some of them have.
    """
    experts, tokens = splits.mesh_axes(ax.EXPERTS), splits.mesh_axes(ax.BATCH)
    common = tuple(axis for axis in experts if axis in tokens)
    if common and common != experts:
        raise ValueError(
            f"strategy {splits.rules.name!r} splits experts over {experts} and batch over {tokens}, so over a "
            f"part of them; let batch be split over all of these or none"
        )
    return splits.num_shards(ax.EXPERTS) > 1 and bool(common)
