"""A model as a function of a flat tuple of arrays.

Flax NNX defines models: names, axes, initialisation. The hot path is plain `jax.jit` over one flat tuple,
because traversing the module costs a hundred times more host time per step.
"""

import dataclasses
import math
import types
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import NamedSharding

from jaxinfer import models
from jaxinfer.config import EncoderConfig, ModelConfig
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax


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
class ModelDefinition:
    """The model's structure, without its arrays.

    Attributes:
      config: the model's numbers.
      family: the module under `jaxinfer/models/`.
      partitioner: mesh and rules.
      params: one spec per parameter, in the order of the flat tuple.
    """

    config: ModelConfig | EncoderConfig
    family: types.ModuleType
    partitioner: Partitioner
    params: tuple[ParamSpec, ...]
    _graph: nnx.GraphDef
    _treedef: jax.tree_util.PyTreeDef

    @classmethod
    def create(
        cls, config: ModelConfig | EncoderConfig, partitioner: Partitioner, dtype: jnp.dtype
    ) -> "ModelDefinition":
        """Allocates nothing. Raises ValueError for a mesh, or a parameter, that it cannot split the model over."""
        _check_mesh(config, partitioner)
        family = models.get(config.family)
        dtype = jnp.dtype(dtype)

        def model() -> nnx.Module:
            key = jax.random.key(0)  # for all: with the keys of nnx.Rngs the time grows as the square of the layers
            return family.Model(config, partitioner, dtype=dtype, rngs=types.SimpleNamespace(params=lambda: key))

        abstract = nnx.eval_shape(model)
        graph, state = nnx.split(abstract, nnx.Param)
        params = []
        for keys, variable in nnx.to_flat_state(state):
            path = "/".join(map(str, keys))
            axes, read_share = variable.get_metadata("logical_axes"), variable.get_metadata("read_share")
            shape = tuple(variable.shape)
            sharding = partitioner.sharding(axes, shape, path)
            params.append(ParamSpec(path, shape, variable.dtype, axes, sharding, read_share))
        return cls(config, family, partitioner, tuple(params), graph, jax.tree.structure(state))

    @property
    def decoder_config(self) -> ModelConfig:
        """`config`, of a decoder."""
        assert isinstance(self.config, ModelConfig)
        return self.config

    def bind(self, arrays: tuple[jax.Array, ...]) -> models.Decoder:
        """The family's `Model` over `arrays`, which are in the order of `params`. For use inside jit."""
        return self._merge(arrays)

    def bind_encoder(self, arrays: tuple[jax.Array, ...]) -> models.Encoder:
        """As `bind`, of an encoder's family."""
        return self._merge(arrays)

    def init(self, seed: int = 0) -> tuple[jax.Array, ...]:
        """Random weights, created already sharded: the same model on every mesh."""

        def make() -> tuple[jax.Array, ...]:
            model = self.family.Model(self.config, Partitioner.create(), dtype=self.dtype, rngs=nnx.Rngs(seed))
            whole = jax.tree.leaves(nnx.state(model, nnx.Param))
            return tuple(spec.repeat_kv_heads(array) for spec, array in zip(self.params, whole, strict=True))

        return jax.jit(make, out_shardings=tuple(spec.sharding for spec in self.params))()

    def _merge(self, arrays: tuple[jax.Array, ...]) -> Any:
        return nnx.merge(self._graph, jax.tree.unflatten(self._treedef, arrays))

    @property
    def abstract_arrays(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of all parameters, to compile with."""
        return tuple(jax.ShapeDtypeStruct(p.shape, p.dtype, sharding=p.sharding) for p in self.params)

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
        """Bytes of the parameters on one device."""
        return sum(spec.shard_bytes for spec in self.params)

    @property
    def step_shard_bytes(self) -> int:
        """Bytes of the parameters that a decode step has to read on one device at least."""
        return sum(int(spec.shard_bytes * spec.read_share) for spec in self.params)


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
