"""Into which pieces a mesh cuts an array, and which devices hold each, for a picture. Host only."""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

from jaxinfer.layouts import AxisSplits, mesh_text, num_sharded_kv_heads
from jaxinfer.planning.weight_shapes import ModelWeights, WeightShape
from jaxinfer.stages import StagePlan
from sharding_rules import axes as ax


class Dimension(NamedTuple):
    """Of an array.

    Attributes:
      name: of its logical axis; "" if it has none.
      size: of the whole array.
      sizes: the devices that cut it along each mesh axis, the slowest first.
    """

    name: str
    size: int
    sizes: Mapping[str, int]

    @property
    def num_pieces(self) -> int:
        return math.prod(self.sizes.values())

    def piece_at(self, place: Mapping[str, int]) -> int:
        """That a device at this place of the mesh holds."""
        piece = 0
        for axis, size in self.sizes.items():
            piece = piece * size + place[axis]
        return piece

    @property
    def label(self) -> str:
        """As "heads 64"."""
        return f"{self.name} {self.size}".lstrip()

    @property
    def over(self) -> str:
        """As "over tensor:4"; "" if it is whole."""
        return f"over {mesh_text(self.sizes)}" if self.sizes else ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pieces:
    """Of an array, drawn as a rectangle.

    Attributes:
      rows, columns: the dimensions that are drawn.
      num_pieces: along all dimensions.
      devices: by row and column those that hold the piece, by their numbers: their places in the mesh, of which the
        last axis counts fastest.
    """

    rows: Dimension
    columns: Dimension
    num_pieces: int
    devices: dict[tuple[int, int], tuple[int, ...]]

    @property
    def num_copies(self) -> int:
        """Devices that hold the same piece."""
        return sum(map(len, self.devices.values())) // self.num_pieces


def cut(axes: ax.Dimensions, shape: tuple[int, ...], splits: AxisSplits, stage: int | None = None) -> Pieces:
    """Of an array of at least two dimensions; `stage`: that alone has it. Raises ValueError if it does not divide.

    Drawn are dimensions that are cut, then those that another mesh would cut, then those that have names; the largest.
    """
    splits.shard_shape(axes, shape)
    rules = splits.rules.rules
    dimensions = [
        Dimension(
            name if isinstance(name, str) else ", ".join(name or ()),
            size,
            {axis: n for axis in mesh_axes if (n := splits.axis_size(axis)) > 1},
        )
        for name, size, mesh_axes in zip(axes, shape, splits.mesh_axes_of(axes), strict=True)
    ]

    def rank(place: int) -> tuple[bool, bool, bool, int]:
        dimension = dimensions[place]
        could_be = bool(rules.get(dimension.name))
        return dimension.num_pieces > 1, could_be, dimension.name != "", dimension.size

    rows, columns = (dimensions[i] for i in sorted(sorted(range(len(shape)), key=rank, reverse=True)[:2]))
    devices: dict[tuple[int, int], tuple[int, ...]] = {}
    for device, place in enumerate(itertools.product(*map(range, splits.sizes.values()))):
        at = dict(zip(splits.sizes, place, strict=True))
        if stage is None or at.get(ax.STAGE, 0) == stage:
            cell = rows.piece_at(at), columns.piece_at(at)
            devices[cell] = (*devices.get(cell, ()), device)
    num_pieces = math.prod(dimension.num_pieces for dimension in dimensions)
    return Pieces(rows=rows, columns=columns, num_pieces=num_pieces, devices=devices)


class WeightPieces(NamedTuple):
    """Of weights that are cut alike.

    Attributes:
      names: of all, the largest first.
      weight: the largest.
      layer: the first that has it; None: it is in no layer.
    """

    names: tuple[str, ...]
    weight: WeightShape
    layer: int | None
    pieces: Pieces


def cut_weights(weights: ModelWeights, splits: AxisSplits, most: int) -> list[WeightPieces]:
    """Of each kind of matrix or table, those with the same axes being one kind; of more than `most` the largest."""
    config = weights.config
    splits = splits.fitted(ax.VOCAB, config.vocab_size)
    num_kv_heads = num_sharded_kv_heads(config.num_kv_heads, splits)
    stages = StagePlan.create(config.num_layers, splits.axis_size(ax.STAGE))
    first_layers = {kind: weights.layers.index(kind) for kind in dict.fromkeys(weights.layers)}
    found: dict[ax.LogicalAxes, list[tuple[WeightShape, int | None]]] = {}
    for layer, of_layer in [(None, weights.outer), *((layer, kind) for kind, layer in first_layers.items())]:
        for weight in of_layer:
            if weight.is_multiplied or (len(weight.shape) > 1 and not weight.read_share):
                found.setdefault(weight.axes, []).append((weight.repeated(num_kv_heads), layer))
    kinds = []
    for alike in found.values():
        alike.sort(key=lambda entry: -entry[0].num_bytes)
        weight, layer = alike[0]
        pieces = cut(weight.axes, weight.shape, splits, None if layer is None else stages.stage_of(layer))
        kinds.append(WeightPieces(tuple(dict.fromkeys(w.path for w, _ in alike)), weight, layer, pieces))
    largest = sorted(kinds, key=lambda kind: -kind.weight.num_bytes)[:most]
    return [kind for kind in kinds if kind in largest]
