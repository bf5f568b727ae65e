"""How a parameter lies in checkpoint tensors.

Parameters keep heads apart, [heads, head_dim, embed], so that a mesh splits whole heads; a Hugging Face
tensor has them merged, [heads * head_dim, embed]. A KV head or an expert that is repeated over devices is stored once.
Several parameters may lie in one tensor, one after the other along its rows; one parameter may lie in several tensors,
an expert in each; and a tensor may be the transpose of what it holds.
"""

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

from jaxinfer.hf_weight_names import EXPERT, TensorPart
from jaxinfer.param_specs import ParamSpec
from jaxinfer.parameters import ModelDefinition
from sharding_rules import axes as ax

Slices = tuple[slice, ...]
Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class StoredParam:
    """A parameter and where it lies.

    Attributes:
      tensors: names of the checkpoint tensors: one, or one for each expert.
      shape: of the parameter with heads merged.
      start: of its rows among those of its tensor.
      is_stacked: whether `tensors` has one for each expert, which is then the first axis of `shape`.
      is_transposed: whether the last two axes of a tensor are the other way round.
    """

    spec: ParamSpec
    tensors: tuple[str, ...]
    shape: Shape
    start: int
    is_stacked: bool
    is_transposed: bool

    @property
    def rows_shape(self) -> Shape:
        """Of what one tensor holds of it, not transposed."""
        return self.shape[1:] if self.is_stacked else self.shape

    def slices(self, shard: Slices, num_kv_heads: int) -> Slices:
        """Of `shape`, behind the shard of the parameter; but its slots where experts lie elsewhere: see `runs`."""
        return stored_slices(shard, self.spec.shape, self.spec.axes, num_kv_heads)

    def runs(self, slices: Slices) -> list[Slices]:
        """Slices of `shape` that, one after the other, are these of the parameter, whose experts lie elsewhere.

        Slots 0:4 with the experts 2, 3, 0, 3 -> the experts 2:4, 0:1 and 3:4
        """
        if self.spec.is_as_stored:
            return [slices]
        slots, *others = slices
        experts = self.spec.placement[slots]
        starts = [i for i, expert in enumerate(experts) if i == 0 or expert != experts[i - 1] + 1]
        ends = itertools.pairwise([*starts, len(experts)])
        return [(slice(experts[start], experts[stop - 1] + 1), *others) for start, stop in ends]

    def pieces(self, slices: Slices) -> list[tuple[str, Slices]]:
        """What to read for these slices of `shape`: tensors, and slices of them."""
        tensors = self.tensors
        if self.is_stacked:
            tensors, slices = tensors[slices[0]], slices[1:]
        rows, *others = slices
        of_tensor = [slice(rows.start + self.start, rows.stop + self.start), *others]
        return [(name, tuple(self._as_stored(of_tensor))) for name in tensors]

    def assemble(self, slices: Slices, dtype: np.dtype, read: Callable[[str, Slices], np.ndarray]) -> np.ndarray:
        """These slices of `shape`, out of what `read` gives of `dtype` for each of the pieces: one after the other."""
        pieces = self.pieces(slices)
        if not self.is_stacked:
            return self._rows_first(read(*pieces[0]))
        whole = np.empty([s.stop - s.start for s in slices], dtype)
        for expert, piece in zip(whole, pieces, strict=True):
            expert[...] = self._rows_first(read(*piece))
        return whole

    def of_tensor(self, name: str, data: np.ndarray) -> np.ndarray:
        """What the tensor `name` holds of the parameter `data`, which has `shape`, not transposed."""
        return data[self.tensors.index(name)] if self.is_stacked else data

    def _rows_first(self, piece: np.ndarray) -> np.ndarray:
        return piece.swapaxes(-1, -2) if self.is_transposed else piece

    def _as_stored(self, axes: list) -> list:
        return [*axes[:-2], axes[-1], axes[-2]] if self.is_transposed else axes


def stored_params(definition: ModelDefinition) -> tuple[StoredParam, ...]:
    """In the order of `definition.params`."""
    names, num_kv_heads = definition.family.weight_names(definition.config), definition.config.num_kv_heads
    assert names.keys() == {spec.path for spec in definition.params}, "a parameter has no tensor, or a tensor none"
    assert len(set(names.values())) == len(names), "two parameters are the same part of a tensor"
    stored = {names[spec.path]: _stored_param(spec, names[spec.path], num_kv_heads) for spec in definition.params}
    starts = {}
    for part in sorted(stored):
        before = part._replace(place=part.place - 1)
        starts[part] = starts[before] + stored[before].rows_shape[0] if part.place else 0
    return tuple(dataclasses.replace(param, start=starts[part]) for part, param in stored.items())


def _stored_param(spec: ParamSpec, part: TensorPart, num_kv_heads: int) -> StoredParam:
    """The first of its tensor."""
    shape, is_stacked = stored_shape(spec.shape_once(num_kv_heads), spec.axes, num_kv_heads), EXPERT in part.name
    tensors = [part.name.replace(EXPERT, str(expert)) for expert in range(shape[0] if is_stacked else 1)]
    return StoredParam(spec, tuple(tensors), shape, 0, is_stacked, part.is_transposed)


def tensors(stored: tuple[StoredParam, ...]) -> dict[str, list[StoredParam]]:
    """The parts of each checkpoint tensor, in their order in it. Tensors of one parameter are neighbours."""
    found: dict[str, list[StoredParam]] = {}
    for param in stored:
        for name in param.tensors:
            found.setdefault(name, []).append(param)
    return {name: sorted(parts, key=lambda part: part.start) for name, parts in found.items()}


def tensor_shape(parts: list[StoredParam]) -> Shape:
    """Of a tensor with these parts, as it is stored."""
    shapes = [part.rows_shape for part in parts]
    assert all(shape[1:] == shapes[0][1:] for shape in shapes), f"{parts[0].tensors[0]}: parts of different width"
    shape = (sum(shape[0] for shape in shapes), *shapes[0][1:])
    return (*shape[:-2], shape[-1], shape[-2]) if parts[0].is_transposed else shape


def stored_shape(shape: Shape, axes: ax.LogicalAxes, num_kv_heads: int) -> Shape:
    """Shape of a parameter with its heads merged: kv_heads as stored, and what `_is_merged` in the axis before.

    (8, 64, 512) named (kv_heads, head_dim, embed), 2 heads stored -> (128, 512)
    """
    stored: list[int] = []
    for size, axis in zip(shape, axes, strict=True):
        if stored and _is_merged(axis):
            stored[-1] *= size
        else:
            stored.append(num_kv_heads if axis == ax.KV_HEADS else size)
    return tuple(stored)


def stored_slices(index: Slices, shape: Shape, axes: ax.LogicalAxes, num_kv_heads: int) -> Slices:
    """The slices of what has `stored_shape`, behind the shard `index` of a parameter.

    kv_heads 2:3 of 8 (2 stored, each on four devices), head_dim 0:64 of 64 -> rows 0:64
    """
    slices: list[slice] = []
    for where, size, axis in zip(index, shape, axes, strict=True):
        if slices and _is_merged(axis):
            before = slices[-1]
            slices[-1] = slice(before.start * size, before.stop * size)
            continue
        start, stop, _ = where.indices(size)
        repeats = size // num_kv_heads if axis == ax.KV_HEADS else 1
        slices.append(slice(start // repeats, (stop - 1) // repeats + 1))
    return tuple(slices)


def _is_merged(axis: str | None) -> bool:
    """Whether a tensor has the axis in the one before it: head_dim, and what has no name, which no mesh splits."""
    return axis in (ax.HEAD_DIM, None)
