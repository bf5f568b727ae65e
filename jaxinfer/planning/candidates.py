"""Every mesh over a cluster's devices: what an engine would hold there and how fast it would be, or why it cannot."""

import bisect
import dataclasses
import functools
from collections.abc import Iterator

import jax.numpy as jnp

from jaxinfer import decoder_plan
from jaxinfer.attention import attention_specs
from jaxinfer.config import ModelConfig
from jaxinfer.decoder_plan import DecoderPlan
from jaxinfer.engine_config import EngineConfig
from jaxinfer.layers.experts import is_exchanged
from jaxinfer.layouts import Layout, mesh_text
from jaxinfer.planner import DoesNotFit
from jaxinfer.planning.clusters import Cluster
from jaxinfer.planning.roofline import AttentionLoad, MeshModel
from jaxinfer.planning.weight_shapes import ModelWeights
from jaxinfer.planning.workload import Performance, Workload, best_rows, predict
from jaxinfer.stages import StagePlan
from sharding_rules import axes as ax

_MOST_ROWS = 1024  # sequences of a data shard


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """A mesh that holds the model, and what it would deliver.

    Attributes:
      config: of an engine on it.
      plan: what that decides.
      model: for times.
    """

    mesh: str
    config: EngineConfig
    plan: DecoderPlan
    model: MeshModel
    performance: Performance

    @property
    def num_devices(self) -> int:
        return self.model.splits.num_devices


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A mesh that cannot be, and why."""

    mesh: str
    reason: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planner:
    """A model that is looking for a mesh.

    Attributes:
      config: what is asked of the engine: its `max_model_len` is decided, its mesh and number of sequences are not.
      model: its numbers.
      weights: its parameters' shapes.
      dtype: of weights and activations.
      free_bytes: of a device, for the engine.
    """

    config: EngineConfig
    model: ModelConfig
    weights: ModelWeights
    dtype: jnp.dtype
    cluster: Cluster
    free_bytes: int
    workload: Workload

    def candidates(self) -> Iterator[Candidate | Rejection]:
        """Of every mesh; for the lowest cost over fewer devices, too."""
        for num_devices in range(1, self.cluster.num_devices + 1):
            is_all = num_devices == self.cluster.num_devices
            if is_all or (self.workload.objective == "cost" and self.cluster.num_devices % num_devices == 0):
                axes = [axis for axis in ax.MESH_AXES if axis != ax.EXPERT or self.model.moe is not None]
                for sizes in meshes(num_devices, tuple(axes)):
                    for sharding in self._strategies(sizes):
                        yield self.candidate(mesh_text(sizes), sharding)

    def _strategies(self, sizes: dict[str, int]) -> tuple[str, ...]:
        if self.config.sharding != "auto" or sizes.get(ax.EXPERT, 1) == 1 or self.model.moe is None:
            return (self.config.sharding,)
        return ("auto", "expert_sums")

    def candidate(self, mesh: str, sharding: str = "auto") -> Candidate | Rejection:
        """Of one mesh, with as many sequences as are best for the workload."""
        name = mesh if sharding in ("auto", self.config.sharding) else f"{mesh} ({sharding})"
        config = dataclasses.replace(self.config, mesh=mesh, sharding=sharding)
        try:
            splits = Layout.create(mesh, sharding, self.cluster.device_kind)
            of_mesh = self.weights.on_mesh(splits)
            model, _ = decoder_plan.with_experts(self.model, config, splits, self.cluster)
            assert isinstance(model, ModelConfig)

            @functools.cache
            def plan(rows: int) -> DecoderPlan:
                return decoder_plan.plan_decoder(
                    dataclasses.replace(config, max_num_seqs=rows * splits.num_shards(ax.BATCH)),
                    model,
                    splits,
                    dtype=self.dtype,
                    weights_bytes=of_mesh.num_bytes,
                    device=self.cluster,
                    free_bytes=self.free_bytes,
                    advise=False,
                )

            def holds(rows: int) -> bool:
                try:
                    return plan(rows).memory.max_concurrency >= rows * splits.num_shards(ax.BATCH)
                except ValueError:
                    return False

            page_size = plan(1).page_size
            most = bisect.bisect_left(range(1, _MOST_ROWS + 1), True, key=lambda rows: not holds(rows))
            mesh_model = self._mesh_model(model, splits, of_mesh, page_size)
        except DoesNotFit as error:
            return Rejection(name, error.short)
        except ValueError as error:
            return Rejection(name, str(error))

        @functools.cache
        def performance_of(rows: int) -> Performance:
            return predict(mesh_model, self.workload, rows, config.max_num_batched_tokens, config.decode_steps)

        performance = best_rows(self.workload, most, performance_of)
        if missed := performance.misses(self.workload):
            return Rejection(name, missed)
        rows = performance.num_seqs // splits.num_shards(ax.BATCH)
        config = dataclasses.replace(config, max_num_seqs=performance.num_seqs)
        return Candidate(mesh=name, config=config, plan=plan(rows), model=mesh_model, performance=performance)

    def _mesh_model(self, model: ModelConfig, splits: Layout, weights, page_size: int) -> MeshModel:
        slots = StagePlan.create(model.num_layers, splits.axis_size(ax.STAGE)).slots
        loads = []
        for of_slot in attention_specs(model, splits, page_size, self.config.cache_dtype):
            spec = max(of_slot, key=lambda spec: spec.window or model.max_position)
            token_bytes = spec.token_bytes(self.dtype.itemsize)
            loads.append(AttentionLoad(spec.num_q_heads, spec.head_dim, spec.out_dim, token_bytes, spec.window))
        return MeshModel(
            cluster=self.cluster,
            splits=splits,
            weights=weights,
            attention=tuple(loads),
            has_experts=tuple(any(layer is not None and model.has_experts(layer) for layer in slot) for slot in slots),
            moe=model.moe,
            embed_dim=model.embed_dim,
            vocab_size=model.vocab_size,
            itemsize=self.dtype.itemsize,
            is_exchanged=is_exchanged(splits),
        )


def meshes(num_devices: int, axes: tuple[str, ...] = ax.MESH_AXES) -> Iterator[dict[str, int]]:
    """Every mesh of so many devices along some of the axes, without those of size 1."""

    def split(count: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
        if not axes:
            if count == 1:
                yield {}
            return
        for size in range(1, count + 1):
            if count % size == 0:
                for rest in split(count // size, axes[1:]):
                    yield {axes[0]: size, **rest}

    for sizes in split(num_devices, axes):
        yield {axis: size for axis, size in sizes.items() if size > 1} or {ax.DATA: 1}


def ranked(found: list[Candidate], objective: str) -> list[Candidate]:
    """The best first; of equals the one with fewer axes."""
    keys = {
        "latency": lambda c: c.performance.request_s,
        "throughput": lambda c: -c.performance.tokens_per_s,
        "cost": lambda c: -c.performance.tokens_per_s / c.num_devices,
    }
    return sorted(found, key=lambda c: (keys[objective](c), c.mesh.count(":")))
