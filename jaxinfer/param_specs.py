"""What is known of parameters before they have memory: as checkpoints have them, and as programs take them.

The same without stages. In a pipeline a parameter of a layer is on the devices of its stage; programs take one array
for those of a slot (`stages`), and it begins with the stages.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

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
      placement: the expert in each place of the experts' axis; empty: there is no such axis.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: ax.LogicalAxes
    sharding: NamedSharding
    placement: tuple[int, ...]

    def repeat(self, array: jax.Array) -> jax.Array:
        """The parameter from `array`, which has every KV head and every expert once.

        Heads are in groups of equal neighbours then, and experts where `placement` has them.
        """
        if ax.KV_HEADS in self.axes:
            axis = self.axes.index(ax.KV_HEADS)
            array = jnp.repeat(array, self.shape[axis] // array.shape[axis], axis)
        return array if self.is_as_stored else array[np.array(self.placement)]

    def shape_once(self, num_kv_heads: int) -> tuple[int, ...]:
        """With every KV head and every expert once: the shape of what `repeat` takes."""
        once: dict[str | None, int] = {ax.KV_HEADS: num_kv_heads, ax.EXPERTS: len(set(self.placement))}
        return tuple(once.get(axis, n) for axis, n in zip(self.axes, self.shape, strict=True))

    @property
    def is_as_stored(self) -> bool:
        """Whether each expert is in the place of its number, and nowhere else."""
        return self.placement == tuple(range(len(self.placement)))

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class WeightSpec:
    """What programs take for a parameter or, in a pipeline, for that of a slot for layers: on each stage its layer's.

    Attributes:
      path: its place in the module tree.
      shape, dtype: of the whole array, which with stages begins with them.
      axes: the logical name of each dimension.
      sharding: over the mesh.
      read_share: of its bytes, what a decode step has to read at least: all, none but the rows of its tokens, or
        those of the experts of one token.
      sources: of each stage the parameter's place in `ModelDefinition.params`; None: zeros, for padding and for what
        other stages' layers have; one for a parameter that is of no layer.
      is_stacked: whether the array begins with the stages.
    """

    path: str
    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: ax.LogicalAxes
    sharding: NamedSharding
    read_share: float
    sources: tuple[int | None, ...]
    is_stacked: bool

    @property
    def shard_bytes(self) -> int:
        """Of one device."""
        return math.prod(self.sharding.shard_shape(self.shape)) * self.dtype.itemsize

    def is_on(self, stage: int) -> bool:
        """Whether it is a parameter there, and not zeros."""
        return not self.is_stacked or self.sources[stage] is not None

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


def param_specs(state: nnx.State, partitioner: Partitioner, plan: StagePlan) -> tuple[ParamSpec, ...]:
    """Of a state with all layers."""
    params = []
    for keys, variable in nnx.to_flat_state(state):
        place, on_stage = tuple(map(str, keys)), partitioner
        if place[0] == _LAYERS:
            on_stage = partitioner.of_stage(plan.stage_of(int(place[1])))
        axes, placement = variable.get_metadata("logical_axes"), variable.get_metadata("placement")
        path, shape = "/".join(place), tuple(variable.shape)
        sharding = on_stage.sharding(axes, shape, path)
        params.append(ParamSpec(path, shape, variable.dtype, axes, sharding, placement))
    return tuple(params)


def weight_specs(
    state: nnx.State, params: tuple[ParamSpec, ...], partitioner: Partitioner, plan: StagePlan
) -> Iterator[WeightSpec]:
    """Of a state with slots for layers. Each parameter is a source of one, or a module's path is no layer's."""
    places = {spec.path: i for i, spec in enumerate(params)}
    left = set(places)
    for keys, variable in nnx.to_flat_state(state):
        place, axes, shape = tuple(map(str, keys)), variable.get_metadata("logical_axes"), tuple(variable.shape)
        path, is_stacked = "/".join(place), place[0] == _LAYERS and plan.num_stages > 1
        sources = (places.get(path),)
        if is_stacked:
            rest = "/".join(key for key in place[2:] if key not in _KINDS)
            sources = tuple(places.get(f"{_LAYERS}/{layer}/{rest}") for layer in plan.slots[int(place[1])])
            axes, shape = (ax.LAYERS, *axes), (plan.num_stages, *shape)
        left -= {params[source].path for source in sources if source is not None}
        read_share, sharding = variable.get_metadata("read_share"), partitioner.sharding(axes, shape, path)
        yield WeightSpec(path, shape, variable.dtype, axes, sharding, read_share, sources, is_stacked)
    assert not left, f"parameters that no slot takes: {sorted(left)}"
