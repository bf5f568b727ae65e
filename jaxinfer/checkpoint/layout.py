"""How a parameter lies in a checkpoint tensor.

Parameters keep heads apart, [heads, head_dim, embed], so that a mesh splits whole heads; a Hugging Face
tensor has them merged, [heads * head_dim, embed]. A KV head that is repeated over devices is stored once. And
several parameters may lie in one tensor, one after the other along its first axis.
"""

import dataclasses

from jaxinfer.parameters import ModelDefinition, ParamSpec
from sharding_rules import axes as ax

Slices = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """A parameter and where it lies.

    Attributes:
      tensor: name of the checkpoint tensor.
      shape: of the tensor, or of its part that is the parameter.
      start: of the part, along the first axis.
    """

    spec: ParamSpec
    tensor: str
    shape: tuple[int, ...]
    start: int

    @property
    def slices(self) -> Slices:
        """The part."""
        first, *others = self.shape
        return (slice(self.start, self.start + first), *(slice(0, size) for size in others))

    def shard_slices(self, index: Slices, num_kv_heads: int) -> Slices:
        """The slices of the tensor behind the shard `index` of the parameter."""
        first, *others = stored_slices(index, self.spec.shape, self.spec.axes, num_kv_heads)
        return (slice(first.start + self.start, first.stop + self.start), *others)


def stored_params(definition: ModelDefinition) -> tuple[StoredParam, ...]:
    """In the order of `definition.params`."""
    names, num_kv_heads = definition.family.weight_names(definition.config), definition.config.num_kv_heads
    assert names.keys() == {spec.path for spec in definition.params}, "a parameter has no tensor, or a tensor none"
    assert len(set(names.values())) == len(names), "two parameters are the same part of a tensor"
    shapes = {names[spec.path]: stored_shape(spec.shape, spec.axes, num_kv_heads) for spec in definition.params}
    starts = {}
    for part in sorted(shapes):
        before = (part.name, part.place - 1)
        starts[part] = starts[before] + shapes[before][0] if part.place else 0
    stored = ((spec, names[spec.path]) for spec in definition.params)
    return tuple(StoredParam(spec, part.name, shapes[part], starts[part]) for spec, part in stored)


def tensors(stored: tuple[StoredParam, ...]) -> dict[str, list[StoredParam]]:
    """The parts of each checkpoint tensor, in their order in it."""
    found: dict[str, list[StoredParam]] = {}
    for param in stored:
        found.setdefault(param.tensor, []).append(param)
    return {name: sorted(parts, key=lambda part: part.start) for name, parts in found.items()}


def tensor_shape(parts: list[StoredParam]) -> tuple[int, ...]:
    """Of a tensor with these parts."""
    rows = [part.shape[1:] for part in parts]
    assert all(row == rows[0] for row in rows), f"{parts[0].tensor}: parts of different width"
    return (sum(part.shape[0] for part in parts), *rows[0])


def stored_shape(shape: tuple[int, ...], axes: ax.LogicalAxes, num_kv_heads: int) -> tuple[int, ...]:
    """Shape of the checkpoint tensor behind a parameter: kv_heads as stored, head_dim merged into its heads.

    (8, 64, 512) named (kv_heads, head_dim, embed), 2 heads stored -> (128, 512)
    """
    stored: list[int] = []
    for size, axis in zip(shape, axes, strict=True):
        if axis == ax.HEAD_DIM and stored:
            stored[-1] *= size
        else:
            stored.append(num_kv_heads if axis == ax.KV_HEADS else size)
    return tuple(stored)


def stored_slices(index: Slices, shape: tuple[int, ...], axes: ax.LogicalAxes, num_kv_heads: int) -> Slices:
    """The slices of the checkpoint tensor behind the shard `index` of a parameter.

    kv_heads 2:3 of 8 (2 stored, each on four devices), head_dim 0:64 of 64 -> rows 0:64
    """
    slices: list[slice] = []
    for where, size, axis in zip(index, shape, axes, strict=True):
        if axis == ax.HEAD_DIM and slices:
            heads = slices[-1]
            slices[-1] = slice(heads.start * size, heads.stop * size)
            continue
        start, stop, _ = where.indices(size)
        repeats = size // num_kv_heads if axis == ax.KV_HEADS else 1
        slices.append(slice(start // repeats, (stop - 1) // repeats + 1))
    return tuple(slices)
