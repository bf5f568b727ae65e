"""A model as a function of a flat tuple of arrays.

Flax NNX defines models: names, axes, initialisation. The hot path is plain `jax.jit` over one flat tuple,
because traversing the module costs a hundred times more host time per step.
"""

import dataclasses
import math
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from jaxinfer import models
from jaxinfer.config import EncoderConfig, ModelConfig
from jaxinfer.partitioning import Partitioner
from jaxinfer.stages import StagePlan
from sharding_rules import axes as ax

_LAYERS = "layers"  # of a model, where it has them
_KINDS = ("dense", "sparse")  # of `DenseOrExperts`


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter before it has memory.

    Attributes:
      path: its place in the module tree, as "layers/0/mlp/up/weight".
      shape, dtype: of the whole array.
      axes: the logical name of each dimension.
      sharding: over the mesh; divisibility is checked.
      read_share: of its bytes, what a decode step has to read at least: all, none but the rows of its tokens, or
        those of the experts of one token.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: ax.LogicalAxes
    sharding: NamedSharding
    read_share: float

    def repeat_kv_heads(self, array: jax.Array) -> jax.Array:
        """The parameter from `array`, which has every KV head once: its heads in groups of equal neighbours."""
        if ax.KV_HEADS not in self.axes:
            return array
        axis = self.axes.index(ax.KV_HEADS)
        return jnp.repeat(array, self.shape[axis] // array.shape[axis], axis)

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def shard_bytes(self) -> int:
        """Of one device."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """What programs take for a parameter or, in a pipeline, for that of a slot for layers: on each stage its layer's.

    Attributes:
      path: its place in the module tree.
      shape, dtype: of the whole array, which with stages begins with them.
      sharding: over the mesh.
      read_share: as of the parameters.
      sources: of each stage the parameter's place in `ModelDefinition.params`; None: zeros, for padding and for what
        other stages' layers have; one for a parameter that is of no layer.
      is_stacked: whether the array begins with the stages.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    sharding: NamedSharding
    read_share: float
    sources: tuple[int | None, ...]
    is_stacked: bool

    @property
    def shard_bytes(self) -> int:
        """Of one device."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize

    def stack(self, params: tuple[jax.Array, ...]) -> jax.Array:
        """Each device's part stays where it is, and what it is part of gets a new name."""
        if not self.is_stacked:
            (source,) = self.sources
            assert source is not None
            return params[source]
        of_device = {
            shard.device: _with_stage_axis(shard.data)
            for source in self.sources
            if source is not None
            for shard in params[source].addressable_shards
        }
        devices = self.sharding.addressable_devices_indices_map(self.shape)
        zeros = np.zeros(self.sharding.shard_shape(self.shape), self.dtype)
        parts = [of_device[d] if d in of_device else jax.device_put(zeros, d) for d in devices]
        return jax.make_array_from_single_device_arrays(self.shape, self.sharding, parts)


_with_stage_axis = jax.jit(lambda x: x[None], donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """The model's structure, without its arrays.

    Attributes:
      config: the model's numbers.
      family: the module under `jaxinfer/models/`.
      partitioner: mesh and rules.
      params: one spec per parameter, each on the devices of its pipeline stage.
      weights: what programs take, in the order of their flat tuple: without stages the same.
    """

    config: ModelConfig | EncoderConfig
    family: types.ModuleType
    partitioner: Partitioner
    params: tuple[ParamSpec, ...]
    weights: tuple[WeightSpec, ...]
    _graph: nnx.GraphDef
    _treedef: jax.tree_util.PyTreeDef

    @classmethod
    def create(
        cls, config: ModelConfig | EncoderConfig, partitioner: Partitioner, dtype: jnp.dtype
    ) -> "ModelDefinition":
        """Allocates nothing. Raises ValueError for a mesh, or a parameter, that it cannot split the model over."""
        _check_mesh(config, partitioner)
        family, plan = models.get(config.family), StagePlan.create(config.num_layers, partitioner.axis_size(ax.STAGE))

        def split(partitioner: Partitioner) -> tuple[nnx.GraphDef, nnx.State]:
            key = jax.random.key(0)  # for all: with the keys of nnx.Rngs the time grows as the square of the layers
            rngs = types.SimpleNamespace(params=lambda: key)
            model = nnx.eval_shape(lambda: family.Model(config, partitioner, dtype=jnp.dtype(dtype), rngs=rngs))
            return nnx.split(model, nnx.Param)

        graph, state = split(partitioner)
        whole = state if plan.num_stages == 1 else split(partitioner.of_stage(0))[1]  # with all layers
        params = _param_specs(whole, partitioner, plan)
        weights = tuple(_weight_specs(state, params, partitioner, plan))
        return cls(config, family, partitioner, params, weights, graph, jax.tree.structure(state))

    @property
    def decoder_config(self) -> ModelConfig:
        """`config`, of a decoder."""
        assert isinstance(self.config, ModelConfig)
        return self.config

    def bind(self, arrays: tuple[jax.Array, ...]) -> models.Decoder:
        """The family's `Model` over what programs take, on a stage without the stages' axis. For use inside jit."""
        return self._merge(arrays)

    def bind_encoder(self, arrays: tuple[jax.Array, ...]) -> models.Encoder:
        """As `bind`, of an encoder's family."""
        return self._merge(arrays)

    def init(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Random parameters, created already sharded: the same model on every mesh."""

        def make(chosen: list[int]) -> list[jax.Array]:
            model = self.family.Model(self.config, Partitioner.create(), dtype=self.dtype, rngs=nnx.Rngs(seed))
            whole = jax.tree.leaves(nnx.state(model, nnx.Param))
            return [self.params[i].repeat_kv_heads(whole[i]) for i in chosen]

        by_mesh: dict[Any, list[int]] = {}
        for i, spec in enumerate(self.params):
            by_mesh.setdefault(spec.sharding.mesh, []).append(i)
        arrays: dict[int, jax.Array] = {}
        for chosen in by_mesh.values():
            shardings = [self.params[i].sharding for i in chosen]
            arrays |= zip(chosen, jax.jit(lambda chosen=chosen: make(chosen), out_shardings=shardings)(), strict=True)
        return tuple(arrays[i] for i in range(len(self.params)))

    def stack(self, arrays: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        """What programs take, of the parameters. Takes the memory of `arrays` over: they are gone then."""
        if self.partitioner.axis_size(ax.STAGE) == 1:
            return arrays
        return tuple(weight.stack(arrays) for weight in self.weights)

    def _merge(self, arrays: tuple[jax.Array, ...]) -> Any:
        return nnx.merge(self._graph, jax.tree.unflatten(self._treedef, arrays))

    @property
    def abstract_arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of what programs take, to compile with."""
        return tuple(jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=w.sharding) for w in self.weights)

    @property
    def dtype(self) -> jnp.dtype:
        """Of every parameter but the few that are never rounded."""
        return self.params[0].dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, counted once whatever the mesh."""
        return sum(spec.num_bytes for spec in self.params)

    @property
    def shard_bytes(self) -> int:
        """Bytes of the weights on one device."""
        return sum(weight.shard_bytes for weight in self.weights)

    @property
    def step_shard_bytes(self) -> int:
        """Bytes of the weights that a decode step has to read on one device at least."""
        return sum(int(weight.shard_bytes * weight.read_share) for weight in self.weights)


def _param_specs(state: nnx.State, partitioner: Partitioner, plan: StagePlan) -> tuple[ParamSpec, ...]:
    """Of a state with all layers."""
    params = []
    for keys, variable in nnx.to_flat_state(state):
        path, on_stage = "/".join(map(str, keys)), partitioner
        if keys[0] == _LAYERS:
            on_stage = partitioner.of_stage(plan.stage_of(int(keys[1])))
        axes, read_share = variable.get_metadata("logical_axes"), variable.get_metadata("read_share")
        shape = tuple(variable.shape)
        params.append(ParamSpec(path, shape, variable.dtype, axes, on_stage.sharding(axes, shape, path), read_share))
    return tuple(params)


def _weight_specs(
    state: nnx.State, params: tuple[ParamSpec, ...], partitioner: Partitioner, plan: StagePlan
) -> Iterator[WeightSpec]:
    """Of a state with slots for layers."""
    places = {spec.path: i for i, spec in enumerate(params)}
    for keys, variable in nnx.to_flat_state(state):
        path, axes, shape = "/".join(map(str, keys)), variable.get_metadata("logical_axes"), tuple(variable.shape)
        is_stacked, sources = keys[0] == _LAYERS and plan.num_stages > 1, (places.get(path),)
        if is_stacked:
            rest = "/".join(key for key in map(str, keys[2:]) if key not in _KINDS)
            sources = tuple(places.get(f"{_LAYERS}/{layer}/{rest}") for layer in plan.slots[int(keys[1])])
            axes, shape = (ax.LAYERS, *axes), (plan.num_stages, *shape)
        read_share, sharding = variable.get_metadata("read_share"), partitioner.sharding(axes, shape, path)
        yield WeightSpec(path, shape, variable.dtype, sharding, read_share, sources, is_stacked)


def _check_mesh(config: ModelConfig | EncoderConfig, partitioner: Partitioner) -> None:
    """Raises ValueError for a mesh axis by which nothing of this model could be split."""
    if isinstance(config, EncoderConfig):
        for axis in (ax.STAGE, ax.EXPERT, ax.CONTEXT):
            if (size := partitioner.axis_size(axis)) > 1:
                raise ValueError(f"--mesh={axis}:{size}: {config.family} is an encoder; use data and tensor")
        return
    if (size := partitioner.axis_size(ax.EXPERT)) > 1 and config.moe is None:
        raise ValueError(f"--mesh=expert:{size}: {config.family} has no experts here; use data:{size} or tensor:{size}")
    if (size := partitioner.axis_size(ax.STAGE)) > config.num_layers:
        raise ValueError(f"--mesh=stage:{size}: the model has {config.num_layers} layers; use at most that many stages")
