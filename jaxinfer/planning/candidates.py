"""Every mesh over a cluster's devices: what an engine would hold there and how fast it would be, or why it cannot."""

import bisect
import collections
import dataclasses
from collections.abc import Iterator, Sequence

import jax.numpy as jnp

from jaxinfer import decoder_plan
from jaxinfer.attention import attention_specs
from jaxinfer.batch import chunk_sizes
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.config import ModelConfig
from jaxinfer.decoder_plan import DecoderPlan
from jaxinfer.engine_config import EngineConfig
from jaxinfer.layers.experts import is_exchanged
from jaxinfer.layouts import Layout, mesh_text
from jaxinfer.planner import DoesNotFit
from jaxinfer.planning.bars import memory_parts
from jaxinfer.planning.clusters import Cluster
from jaxinfer.planning.loads import AttentionLoad, LayerKind
from jaxinfer.planning.meshes import meshes
from jaxinfer.planning.roofline import MeshModel
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

    @property
    def memory_parts(self) -> dict[str, int]:
        """Bytes of a device, by what they are for."""
        return memory_parts(self.plan.memory, self.config.memory_fraction, self.model.cluster.memory_bytes)


@dataclasses.dataclass(frozen=True)
class Rejection:
    """A mesh that cannot be, and why.

    Attributes:
      excess_bytes: of a device, where it is memory that it lacks.
      is_too_slow: whether it holds the model, and misses what is asked of its speed.
    """

    mesh: str
    reason: str
    excess_bytes: int | None = None
    is_too_slow: bool = False


class _TooSlow(ValueError):
    pass


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planner:
    """A model that is looking for a mesh.

    Attributes:
      config: what is asked of the engine. Its `max_model_len` is decided; a mesh in it is the only one.
      model: its numbers.
      weights: its parameters' shapes.
      dtype: of weights and activations.
      free_bytes: of a device, for the engine.
      num_seqs: that decode together; None: as many as are best.
    """

    config: EngineConfig
    model: ModelConfig
    weights: ModelWeights
    dtype: jnp.dtype
    cluster: Cluster
    free_bytes: int
    workload: Workload
    num_seqs: int | None = None

    def candidates(self) -> Iterator[Candidate | Rejection]:
        """Of every mesh; for the lowest cost over fewer devices, too."""
        if self.config.mesh:
            yield self.candidate(self.config.mesh, self.config.sharding)
            return
        for num_devices in range(1, self.cluster.num_devices + 1):
            is_all = num_devices == self.cluster.num_devices
            if is_all or (self.workload.objective == "cost" and self.cluster.num_devices % num_devices == 0):
                axes = [axis for axis in ax.MESH_AXES if axis != ax.EXPERT or self.model.moe is not None]
                for sizes in meshes(num_devices, tuple(axes)):
                    for sharding in self._strategies(sizes):
                        yield self.candidate(mesh_text(sizes), sharding)

    def more_devices(self, rejected: Sequence[Rejection] = ()) -> str | None:
        """As `--devices` spells it what would do, twice as many again and again; None where that does not help.

        Where meshes that were `rejected` are too slow, it is not looked for far: there is a time for each mesh.
        """
        for factor in (2, 4) if any(each.is_too_slow for each in rejected) else (2, 4, 8, 16, 32):
            nodes, each = self.cluster.num_nodes, self.cluster.devices_per_node
            grown = min(factor * each, max(each, self.cluster.most_per_node))
            cluster = dataclasses.replace(
                self.cluster, num_nodes=nodes * factor * each // grown, devices_per_node=grown
            )
            larger = dataclasses.replace(self, cluster=cluster)
            if any(isinstance(found, Candidate) for found in larger.candidates()):
                name, nodes, each = cluster.name, cluster.num_nodes, cluster.devices_per_node
                return f"{name}:{nodes}x{each}" if nodes > 1 else f"{name}:{each}"
        return None

    def _strategies(self, sizes: dict[str, int]) -> tuple[str, ...]:
        if self.config.sharding != "auto" or sizes.get(ax.EXPERT, 1) == 1 or self.model.moe is None:
            return (self.config.sharding,)
        return ("auto", "expert_sums")

    def candidate(self, mesh: str, sharding: str = "auto") -> Candidate | Rejection:
        """Of one mesh, with as many sequences as are best for the workload."""
        name = mesh if sharding in ("auto", self.config.sharding) else f"{mesh} ({sharding})"
        try:
            return _OnMesh(self, mesh, sharding).candidate(name)
        except DoesNotFit as error:
            return Rejection(name, error.short, error.excess_bytes)
        except _TooSlow as error:
            return Rejection(name, str(error), is_too_slow=True)
        except ValueError as error:
            return Rejection(name, str(error))


class _OnMesh:
    """One mesh under consideration. Raises ValueError where the model does not divide over it."""

    def __init__(self, planner: Planner, mesh: str, sharding: str):
        self._planner = planner
        self._config = dataclasses.replace(planner.config, mesh=mesh, sharding=sharding)
        splits = Layout.create(mesh, sharding, planner.cluster.device_kind)
        self._splits = splits = splits.fitted(ax.VOCAB, planner.model.vocab_size)  # as `ModelDefinition` does
        self._num_shards = splits.num_shards(ax.BATCH)
        self._weights = planner.weights.on_mesh(splits)
        model, _ = decoder_plan.with_experts(planner.model, self._config, splits, planner.cluster)
        assert isinstance(model, ModelConfig)
        self._model = model

    def candidate(self, name: str) -> Candidate:
        """Raises ValueError where nothing that is asked for fits, or it is too slow."""
        workload, num_seqs = self._planner.workload, self._planner.num_seqs
        mesh_model = self._mesh_model(self._plan(1).page_size)
        most = bisect.bisect_left(range(1, _MOST_ROWS + 1), True, key=lambda rows: not self._holds(rows))

        def performance_of(rows: int) -> Performance:
            return predict(mesh_model, workload, rows, self._chunk_policy(rows), self._config.decode_steps)

        if num_seqs is None:
            performance = best_rows(workload, most, performance_of)
            num_seqs = performance.num_seqs
        else:  # those that do not fit wait
            rows = decoder_plan.rows_per_shard(dataclasses.replace(self._config, max_num_seqs=num_seqs), self._splits)
            performance = performance_of(min(rows, most))
        if missed := performance.misses(workload):
            raise _TooSlow(missed)
        return Candidate(
            mesh=name,
            config=dataclasses.replace(self._config, max_num_seqs=num_seqs),
            plan=self._plan(num_seqs // self._num_shards),
            model=mesh_model,
            performance=performance,
        )

    def _chunk_policy(self, rows: int) -> ChunkPolicy:
        config, smallest = self._config, decoder_plan.MIN_CHUNK[self._planner.cluster.platform]
        assert config.max_model_len is not None
        budget = config.max_num_batched_tokens
        return ChunkPolicy(budget, chunk_sizes(budget, config.max_model_len, rows, smallest))

    def _plan(self, rows: int) -> DecoderPlan:
        """With so many sequences in each data shard."""
        planner = self._planner
        return decoder_plan.plan_decoder(
            dataclasses.replace(self._config, max_num_seqs=rows * self._num_shards),
            self._model,
            self._splits,
            dtype=planner.dtype,
            weights_bytes=self._weights.num_bytes,
            device=planner.cluster,
            free_bytes=planner.free_bytes,
            advise=False,
        )

    def _holds(self, rows: int) -> bool:
        try:
            return self._plan(rows).memory.max_concurrency >= rows * self._num_shards
        except ValueError:
            return False

    def _mesh_model(self, page_size: int) -> MeshModel:
        planner, model, splits = self._planner, self._model, self._splits
        slots = StagePlan.create(model.num_layers, splits.axis_size(ax.STAGE)).slots
        kinds: collections.Counter[tuple[AttentionLoad, bool]] = collections.Counter()
        specs = attention_specs(model, splits, page_size, planner.config.cache_dtype)
        for slot, of_slot in zip(slots, specs, strict=True):
            spec = max(of_slot, key=lambda spec: spec.window or model.max_position)
            token_bytes = spec.token_bytes(planner.dtype.itemsize)
            load = AttentionLoad(spec.num_q_heads, spec.head_dim, spec.out_dim, token_bytes, spec.window)
            kinds[load, any(layer is not None and model.has_experts(layer) for layer in slot)] += 1
        return MeshModel(
            cluster=planner.cluster,
            splits=splits,
            weights=self._weights,
            layers=tuple(LayerKind(*kind, num_slots) for kind, num_slots in kinds.items()),
            moe=model.moe,
            embed_dim=model.embed_dim,
            vocab_size=model.vocab_size,
            itemsize=planner.dtype.itemsize,
            is_exchanged=is_exchanged(splits),
        )


def ranked(found: list[Candidate], objective: str) -> list[Candidate]:
    """The best first; of equals the one with fewer axes."""
    keys = {
        "latency": lambda c: c.performance.request_s,
        "throughput": lambda c: -c.performance.tokens_per_s,
        "cost": lambda c: -c.performance.tokens_per_s / c.num_devices,
    }
    return sorted(found, key=lambda c: (keys[objective](c), c.mesh.count(":")))
