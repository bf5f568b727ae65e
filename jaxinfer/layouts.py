"""How a mesh splits arrays, as arithmetic over the names of their axes. Host only: no device has to be there."""

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Self

import sharding_rules
from jaxinfer.config import EncoderConfig, ModelConfig
from sharding_rules import axes as ax


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes by mesh axis from `"data:2,tensor:4"`; "" means one device.

    >>> parse_mesh("data:2,tensor:4")
    {'data': 2, 'tensor': 4}
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        match = re.fullmatch(r"([a-z_]+):(\d+)", part)
        if match is None:
            raise ValueError(f"--mesh={text}: {part!r} is not axis:size, as in --mesh=data:2,tensor:4")
        axis, size = match[1], int(match[2])
        if axis not in ax.MESH_AXES:
            raise ValueError(f"--mesh={text}: unknown mesh axis {axis!r}; known: {', '.join(ax.MESH_AXES)}")
        if axis in sizes:
            raise ValueError(f"--mesh={text}: mesh axis {axis!r} is given twice")
        if size < 1:
            raise ValueError(f"--mesh={text}: axis {axis!r} has size {size}; sizes start at 1")
        sizes[axis] = size
    return sizes


def mesh_text(sizes: Mapping[str, int]) -> str:
    """The spelling that `parse_mesh` reads."""
    return ",".join(f"{axis}:{size}" for axis, size in sizes.items())


def mesh_shape(text: str) -> dict[str, int]:
    """Sizes by mesh axis, in the order in which axes are laid out."""
    sizes = parse_mesh(text)
    return {axis: sizes[axis] for axis in ax.MESH_AXES if axis in sizes} or {ax.DATA: 1}


def rules_for(mesh: str, sharding: str) -> sharding_rules.RuleSet:
    """What `--sharding` names, where "auto" is the table for inference.

    Raises ValueError where `--mesh` has an axis that it leaves idle.
    """
    used = tuple(axis for axis, size in mesh_shape(mesh).items() if size > 1)
    rules = sharding_rules.get(sharding_rules.DEFAULT if sharding == "auto" else sharding)
    if idle := [axis for axis in used if axis not in rules.mesh_axes]:
        raise ValueError(
            f"--sharding={sharding} leaves the mesh axes {idle} of --mesh={mesh} idle; "
            f"it splits over {list(rules.mesh_axes) or 'nothing'}, or use --sharding=auto"
        )
    return rules


class AxisSplits:
    """What follows from the sizes of a mesh and the rules, which a subclass has.

    Attributes:
      rules: the sharding strategy.
    """

    rules: sharding_rules.RuleSet

    @property
    def sizes(self) -> Mapping[str, int]:
        """By mesh axis."""
        raise NotImplementedError

    @property
    def device_kind(self) -> str | None:
        """As JAX calls the mesh's devices, wherever they are; None: nothing is known of them."""
        raise NotImplementedError

    @property
    def num_devices(self) -> int:
        return math.prod(self.sizes.values())

    def axis_size(self, mesh_axis: str) -> int:
        """Devices along `mesh_axis`; 1 if the mesh lacks it."""
        return self.sizes.get(mesh_axis, 1)

    def mesh_axes(self, logical_axis: str) -> tuple[str, ...]:
        """Those of the mesh that split `logical_axis`."""
        return self.mesh_axes_of((logical_axis,))[0]

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

    def mesh_axes_of(self, axes: ax.Dimensions) -> tuple[tuple[str, ...], ...]:
        """Those of the mesh that split each dimension. Raises ValueError for a name with no rule."""
        rules = self.rules.rules
        by_dimension = [(axis,) if isinstance(axis, str) else axis or () for axis in axes]
        if unknown := [axis for names in by_dimension for axis in names if axis not in rules]:
            raise ValueError(f"no sharding rule for logical axis {unknown}; known: {sorted(rules)}")
        return tuple(tuple(m for axis in names for m in rules[axis] if m in self.sizes) for names in by_dimension)

    def shard_shape(self, axes: ax.Dimensions, shape: tuple[int, ...], name: str = "array") -> tuple[int, ...]:
        """Of what one device has of an array. Raises ValueError for a dimension that does not divide."""
        if len(axes) != len(shape):
            raise ValueError(f"{name}: {len(shape)} dimensions {shape} but {len(axes)} axis names {axes}")
        sizes = zip(axes, shape, self.mesh_axes_of(axes), strict=True)
        return tuple(self._divided(axis, size, mesh_axes, name) for axis, size, mesh_axes in sizes)

    def _divided(self, axis: str | tuple[str, ...] | None, size: int, mesh_axes: tuple[str, ...], name: str) -> int:
        sizes = {mesh_axis: self.axis_size(mesh_axis) for mesh_axis in mesh_axes}
        shards = math.prod(sizes.values())
        if size % shards:
            legal = [n for n in range(1, shards) if size % n == 0]
            raise ValueError(
                f"{name}: {axis} {size} does not divide over --mesh {mesh_text(sizes)} "
                f"({shards} devices); sizes that would do: {', '.join(map(str, legal))}"
            )
        return size // shards

    def fitted(self, logical_axis: str, size: int) -> Self:
        """One that splits `logical_axis` over those of its mesh axes that `size` divides by, on the most devices."""
        axes = self.mesh_axes(logical_axis)
        subsets = [subset for n in range(len(axes) + 1) for subset in itertools.combinations(axes, n)]
        num_devices = {subset: math.prod(map(self.axis_size, subset)) for subset in subsets}
        best = max((subset for subset in subsets if size % num_devices[subset] == 0), key=num_devices.__getitem__)
        rules = {**self.rules.rules, logical_axis: best}
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, rules=rules))  # pyright: ignore[reportArgumentType]


@dataclasses.dataclass(frozen=True)
class Layout(AxisSplits):
    """A mesh of devices that need not be there.

    Attributes:
      mesh: devices along each axis.
      rules: the sharding strategy.
      kind: of the devices, as JAX calls it; None: nothing is known of them.
    """

    mesh: Mapping[str, int]
    rules: sharding_rules.RuleSet
    kind: str | None = None

    @classmethod
    def create(cls, mesh: str = "", sharding: str = "auto", kind: str | None = None) -> "Layout":
        """From the spelling of `--mesh` and `--sharding`. Raises ValueError as `rules_for` does."""
        return cls(mesh_shape(mesh), rules_for(mesh, sharding), kind)

    @property
    def sizes(self) -> Mapping[str, int]:
        return self.mesh

    @property
    def device_kind(self) -> str | None:
        return self.kind


def num_sharded_kv_heads(num_kv_heads: int, splits: AxisSplits) -> int:
    """KV heads that weights and cache hold: each is repeated when there are fewer of them than shards.

    With 2 KV heads over tensor:8 every head is held by a group of four neighbouring devices, so the
    arrays have 8. Query head n then reads head n // (num_q_heads / 8), a copy of the same head as before.

    Raises ValueError when neither number divides the other.
    """
    shards = splits.num_shards(ax.KV_HEADS)
    if num_kv_heads % shards == 0:
        return num_kv_heads
    if shards % num_kv_heads == 0:
        return shards
    legal = [n for n in range(1, shards + 1) if num_kv_heads % n == 0 or n % num_kv_heads == 0]
    sizes = {axis: splits.axis_size(axis) for axis in splits.rules.rules[ax.KV_HEADS]}
    raise ValueError(
        f"kv_heads {num_kv_heads} neither divides nor is divided by the {shards} devices of --mesh "
        f"{mesh_text(sizes)}; sizes that would do: {', '.join(map(str, legal))}"
    )


def check_mesh(config: ModelConfig | EncoderConfig, splits: AxisSplits) -> None:
    """Raises ValueError for a mesh axis by which nothing of this model could be split."""
    if isinstance(config, EncoderConfig):
        for axis in (ax.STAGE, ax.EXPERT, ax.CONTEXT):
            if (size := splits.axis_size(axis)) > 1:
                raise ValueError(f"--mesh={axis}:{size}: {config.family} is an encoder; use data and tensor")
        return
    if (size := splits.axis_size(ax.EXPERT)) > 1 and config.moe is None:
        raise ValueError(f"--mesh=expert:{size}: {config.family} has no experts here; use data:{size} or tensor:{size}")
    if (size := splits.axis_size(ax.STAGE)) > config.num_layers:
        raise ValueError(f"--mesh=stage:{size}: the model has {config.num_layers} layers; use at most that many stages")
