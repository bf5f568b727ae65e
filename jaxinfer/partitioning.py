"""Turns logical axis names into shardings on a device mesh. The only place that does.

A model says what an axis *is* (`heads`), a strategy in `sharding_rules/` says which mesh axis splits
it (`tensor`), and this module makes the `NamedSharding`, or refuses in words: Flax passes an unknown
name through or replicates silently, and XLA's own message for a dimension that does not divide names
neither the tensor nor the way out.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

import sharding_rules
from jaxinfer.layouts import AxisSplits, mesh_shape, rules_for
from jaxinfer.meshes import make_mesh
from pallas_kernels import draw
from pallas_kernels.native import build
from sharding_rules import axes as ax

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Partitioner(AxisSplits):
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
        return cls(make_mesh(mesh, devices), rules_for(mesh, sharding))

    @classmethod
    def abstract(cls, mesh: str, sharding: str = "auto") -> "Partitioner":
        """As `create`, for devices that need not be there: shardings have shapes and no arrays."""
        shape = mesh_shape(mesh)
        abstract_mesh = AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
        return cls(abstract_mesh, rules_for(mesh, sharding))

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

    @property
    def platform(self) -> str:
        """As JAX calls what the mesh's devices are, wherever they are; of an abstract mesh, what it runs on here."""
        return self.mesh.devices.flat[0].platform if isinstance(self.mesh, Mesh) else jax.default_backend()

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.mesh.shape

    def spec(self, axes: ax.Dimensions) -> PartitionSpec:
        """`PartitionSpec` for an array whose axes are named `axes`, without trailing Nones dropped.

        Raises ValueError for a name with no rule and for a mesh axis that would be used twice.
        """
        split = self.mesh_axes_of(axes)
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
            self.shard_shape(axes, shape, name)
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

    @property
    def settings(self) -> str:
        """Equal for those that split in the same way, and have the same kernels."""
        kernels = self.multiplies_in_kernel, self.draw_kernel is not None
        return repr((dict(self.mesh.shape), self.rules, kernels))

    def shard_map(self, function: Callable[..., T], *, in_specs: Any, out_specs: Any) -> Callable[..., T]:
        """`jax.shard_map` over the mesh, or over what is left of it inside of another; nothing on one device."""
        if self.mesh.size == 1:
            return function
        mesh = self._mesh_here
        names = frozenset(mesh.axis_names) - frozenset(mesh.manual_axes if isinstance(mesh, AbstractMesh) else ())
        specs = {"in_specs": in_specs, "out_specs": out_specs}
        return jax.shard_map(function, mesh=mesh, axis_names=names, check_vma=False, **specs)

    def in_each_shard(self, function: Callable[..., T]) -> Callable[..., T]:
        """Of arrays that begin with rows, those of each data shard by themselves, whole in what else they have."""
        rows = self.spec((ax.BATCH,))
        return self.shard_map(function, in_specs=rows, out_specs=rows)

    @property
    def draw_kernel(self) -> draw.Kernel | None:
        """What draws where each device has all of the vocabulary for its rows; None if that is left to XLA."""
        if not isinstance(self.mesh, Mesh) or self.num_shards(ax.VOCAB) > 1:
            return None
        # Processes of CPUs could differ in whether they have a compiler, and run one program.
        is_of_cpus = self.platform == "cpu" and self.mesh.is_multi_process
        return None if is_of_cpus else draw.kernel_for(self.device)

    @property
    def multiplies_in_kernel(self) -> bool:
        """Whether all there is is one CPU, whose own kernels multiply with a weight that nothing splits."""
        is_one_cpu = isinstance(self.mesh, Mesh) and self.mesh.size == 1 and self.platform == "cpu"
        return is_one_cpu and build.unavailable() is None

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


def _spec_entry(mesh_axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
    if not mesh_axes:
        return None
    return mesh_axes[0] if len(mesh_axes) == 1 else mesh_axes
