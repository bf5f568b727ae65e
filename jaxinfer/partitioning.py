"""Turns logical axis names into shardings on a device mesh. The only place that does.

A model says what an axis *is* (`heads`), a strategy in `sharding_rules/` says which mesh axis splits
it (`tensor`), and this module makes the `NamedSharding`, or refuses in words: Flax passes an unknown
name through or replicates silently, and XLA's own message for a dimension that does not divide names
neither the tensor nor the way out.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import sharding_rules
from jaxinfer.meshes import make_mesh, mesh_shape, mesh_text
from sharding_rules import axes as ax

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh and the rules that map logical axes onto it.

    Attributes:
      mesh: the device mesh, or one without devices, for arithmetic.
      rules: the sharding strategy.
    """

    mesh: Mesh | AbstractMesh
    rules: sharding_rules.RuleSet

    @classmethod
    def create(cls, mesh: str = "", sharding: str = "auto", devices: list[jax.Device] | None = None) -> "Partitioner":
        """From the spelling of `--mesh` and `--sharding`, where "auto" is the table for inference.

        Raises ValueError where the mesh has an axis that the strategy leaves idle.
        """
        return cls(make_mesh(mesh, devices), _rules(mesh, sharding))

    @classmethod
    def abstract(cls, mesh: str, sharding: str = "auto") -> "Partitioner":
        """As `create`, for devices that need not be there: shardings have shapes and no arrays."""
        shape = mesh_shape(mesh)
        abstract_mesh = AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
        return cls(abstract_mesh, _rules(mesh, sharding))

    @property
    def device_mesh(self) -> Mesh:
        """The mesh, of devices that are there."""
        assert isinstance(self.mesh, Mesh), "there are no devices behind an abstract mesh"
        return self.mesh

    @property
    def device(self) -> jax.Device:
        """One of the mesh's devices in this process. All of them are of a kind."""
        return self.device_mesh.local_devices[0]

    @property
    def device_kind(self) -> str | None:
        """As JAX calls the mesh's devices, wherever they are; None of an abstract mesh."""
        return self.mesh.devices.flat[0].device_kind if isinstance(self.mesh, Mesh) else None

    def axis_size(self, mesh_axis: str) -> int:
        """Devices along `mesh_axis`; 1 if the mesh lacks it."""
        return self.mesh.shape.get(mesh_axis, 1)

    def mesh_axes(self, logical_axis: str) -> tuple[str, ...]:
        """Those of the mesh that split `logical_axis`."""
        return self._mesh_axes((logical_axis,))[0]

    def num_shards(self, logical_axis: str) -> int:
        """Into how many pieces `logical_axis` is cut."""
        return math.prod(map(self.axis_size, self.mesh_axes(logical_axis)))

    @property
    def context_axes(self) -> tuple[str, ...]:
        """Mesh axes that spread the pages of one sequence: those that split pages behind those that split sequences.

        Raises ValueError for a strategy that would put a sequence's pages where the sequence is not.
        """
        sequences, pages = self.mesh_axes(ax.BATCH), self.mesh_axes(ax.PAGES)
        if pages[: len(sequences)] != sequences:
            raise ValueError(
                f"strategy {self.rules.name!r} splits batch over {sequences} and pages over {pages}: a sequence's "
                f"pages are on its own devices; let pages begin with {sequences}"
            )
        return tuple(axis for axis in pages[len(sequences) :] if self.axis_size(axis) > 1)

    @property
    def context_size(self) -> int:
        """Over how many devices the pages of a sequence are spread."""
        return math.prod(map(self.axis_size, self.context_axes))

    def split_text(self, logical_axis: str) -> str:
        """The part of `--mesh` that splits `logical_axis`: "data:2,expert:4"."""
        return mesh_text({axis: self.axis_size(axis) for axis in self.mesh_axes(logical_axis)})

    def spec(self, axes: ax.Dimensions) -> PartitionSpec:
        """`PartitionSpec` for an array whose axes are named `axes`, without trailing Nones dropped.

        Raises ValueError for a name with no rule and for a mesh axis that would be used twice.
        """
        split = self._mesh_axes(axes)
        used = [mesh_axis for mesh_axes in split for mesh_axis in mesh_axes]
        if len(used) != len(set(used)):
            twice = sorted({axis for axis in used if used.count(axis) > 1})
            raise ValueError(
                f"array axes {axes}: strategy {self.rules.name!r} splits two of them over mesh axis {twice}; "
                f"an array can use each mesh axis once"
            )
        return PartitionSpec(*(_spec_entry(mesh_axes) for mesh_axes in split))

    def sharding(self, axes: ax.Dimensions, shape: tuple[int, ...] | None = None, name: str = "array") -> NamedSharding:
        """`NamedSharding` for `axes`; with `shape`, also checks that every split dimension divides."""
        spec = self.spec(axes)
        if shape is not None:
            self._check_divisible(axes, shape, name)
        return NamedSharding(self.mesh, spec)

    def row_sharding(self, shape: tuple[int, ...]) -> NamedSharding:
        """Of an array of a step, whose first dimension is the data shard; a scalar is for all."""
        return self.sharding((ax.BATCH, *[None] * (len(shape) - 1))) if shape else self.replicated

    def of_stage(self, stage: int) -> "Partitioner":
        """For the devices of one pipeline stage, whose mesh has a `stage` axis of size 1, if any."""
        if self.axis_size(ax.STAGE) == 1:
            return self
        names, types = self.mesh.axis_names, self.mesh.axis_types
        if isinstance(self.mesh, AbstractMesh):
            sizes = tuple((self.mesh.shape | {ax.STAGE: 1}).values())
            return dataclasses.replace(self, mesh=AbstractMesh(sizes, names, axis_types=types))
        grid = np.take(self.mesh.devices, [stage], axis=names.index(ax.STAGE))
        return dataclasses.replace(self, mesh=Mesh(grid, names, axis_types=types))

    def fitted(self, logical_axis: str, size: int) -> "Partitioner":
        """One that splits `logical_axis` over those of its mesh axes that `size` divides by, on the most devices."""
        axes = self.mesh_axes(logical_axis)
        subsets = [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]
        num_devices = {subset: math.prod(map(self.axis_size, subset)) for subset in subsets}
        best = max((subset for subset in subsets if size % num_devices[subset] == 0), key=num_devices.__getitem__)
        rules = {**self.rules.rules, logical_axis: best}
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, rules=rules))

    def shard_map(self, function: Callable[..., T], *, in_specs: Any, out_specs: Any) -> Callable[..., T]:
        """`jax.shard_map` over the mesh, or over what is left of it inside of another; nothing on one device."""
        if self.mesh.size == 1:
            return function
        mesh = self._mesh_here
        names = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes if isinstance(mesh, AbstractMesh) else ())
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(function, mesh=mesh, axis_names=names, check_vma=False, **specs)

    @property
    def _mesh_here(self) -> Mesh | AbstractMesh:
        """The mesh, or inside of a `shard_map` over some of its axes the one that knows of that."""
        inside = jax.sharding.get_abstract_mesh()
        return inside if inside.manual_axes else self.mesh

    def put_rows(self, arrays: T) -> T:
        """Arrays of a step, on the host, sent to their devices without waiting. Every process has all of them."""
        shardings = jax.tree.map(lambda a: self.row_sharding(a.shape), arrays)
        if not self.device_mesh.is_multi_process:
            return jax.device_put(arrays, shardings)
        # device_put first compares the array between all processes, by a collective that waits for what runs.
        put = lambda a, sharding: jax.make_array_from_callback(a.shape, sharding, lambda index: a[index])  # noqa: E731
        return jax.tree.map(put, arrays, shardings)

    @functools.cached_property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())

    def constrain(self, x: jax.Array, axes: ax.Dimensions) -> jax.Array:
        """Tells XLA how `x` is laid out. For use inside jit; a no-op on one device."""
        if self.mesh.size == 1:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self._mesh_here, self.spec(axes)))

    def _mesh_axes(self, axes: ax.Dimensions) -> tuple[tuple[str, ...], ...]:
        rules = self.rules.rules
        by_dimension = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
        if unknown := [axis for names in by_dimension for axis in names if axis not in rules]:
            raise ValueError(f"no sharding rule for logical axis {unknown}; known: {sorted(rules)}")
        return tuple(tuple(m for axis in names for m in rules[axis] if m in self.mesh.shape) for names in by_dimension)

    def _check_divisible(self, axes: ax.Dimensions, shape: tuple[int, ...], name: str) -> None:
        if len(axes) != len(shape):
            raise ValueError(f"{name}: {len(shape)} dimensions {shape} but {len(axes)} axis names {axes}")
        for axis, size, mesh_axes in zip(axes, shape, self._mesh_axes(axes), strict=True):
            sizes = {mesh_axis: self.axis_size(mesh_axis) for mesh_axis in mesh_axes}
            shards = math.prod(sizes.values())
            if size % shards:
                legal = [n for n in range(1, shards) if size % n == 0]
                raise ValueError(
                    f"{name}: {axis} {size} does not divide over --mesh {mesh_text(sizes)} "
                    f"({shards} devices); sizes that would do: {', '.join(map(str, legal))}"
                )


def _rules(mesh: str, sharding: str) -> sharding_rules.RuleSet:
    used = tuple(axis for axis, size in mesh_shape(mesh).items() if size > 1)
    rules = sharding_rules.get(sharding_rules.DEFAULT if sharding == "auto" else sharding)
    if idle := [axis for axis in used if axis not in rules.mesh_axes]:
        raise ValueError(
            f"--sharding={sharding} leaves the mesh axes {idle} of --mesh={mesh} idle; "
            f"it splits over {list(rules.mesh_axes) or 'nothing'}, or use --sharding=auto"
        )
    return rules


def _spec_entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if not mesh_axes:
        return None
    return mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes


def num_sharded_kv_heads(num_kv_heads: int, partitioner: Partitioner) -> int:
    """KV heads that weights and cache hold: each is repeated when there are fewer of them than shards.

    With 2 KV heads over tensor:8 every head is held by a group of four neighbouring devices, so the
    arrays have 8. Query head n then reads head n // (num_q_heads / 8), a copy of the same head as before.

    Raises ValueError when neither number divides the other.
    """
    shards = partitioner.num_shards(ax.KV_HEADS)
    if num_kv_heads % shards == 0:
        return num_kv_heads
    if shards % num_kv_heads == 0:
        return shards
    legal = [n for n in range(1, shards + 1) if num_kv_heads % n == 0 or n % num_kv_heads == 0]
    sizes = {axis: partitioner.axis_size(axis) for axis in partitioner.rules.rules[ax.KV_HEADS]}
    raise ValueError(
        f"kv_heads {num_kv_heads} neither divides nor is divided by the {shards} devices of --mesh "
        f"{mesh_text(sizes)}; sizes that would do: {', '.join(map(str, legal))}"
    )
