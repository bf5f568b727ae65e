"""What a model's parameters take of each device of a mesh, from their shapes on one. Host only."""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from jaxinfer.config import ModelConfig
from jaxinfer.layouts import AxisSplits, check_mesh, num_sharded_kv_heads
from jaxinfer.stages import StagePlan
from sharding_rules import axes as ax

LAYERS = "layers"  # of a model, where its parameters have them


class WeightShape(NamedTuple):
    """A parameter on one device, whole.

    Attributes:
      path: its place in the module tree; of a layer, below it.
      shape: of the array.
      axes: the logical name of each dimension.
      itemsize: bytes of a number.
      read_share: as `WeightSpec.read_share`.
    """

    path: str
    shape: tuple[int, ...]
    axes: ax.LogicalAxes
    itemsize: float
    read_share: float

    @property
    def is_multiplied(self) -> bool:
        """Whether tokens are multiplied by it, and not only added to or scaled."""
        return len(self.shape) > 1 and self.read_share > 0 and not self.path.endswith("bias")

    @property
    def num_bytes(self) -> float:
        return self.itemsize * math.prod(self.shape)

    def repeated(self, num_kv_heads: int) -> "WeightShape":
        """With so many KV heads, as `num_sharded_kv_heads` has them."""
        sizes: Mapping[str | None, int] = {ax.KV_HEADS: num_kv_heads}
        return self._replace(shape=tuple(sizes.get(axis, n) for axis, n in zip(self.axes, self.shape, strict=True)))


@dataclasses.dataclass(frozen=True)
class DeviceWeights:
    """Of one device, of some parameters.

    Attributes:
      num_bytes: that it holds.
      dense_bytes: of them, those that every step reads.
      expert_bytes: of them, those of experts, of which a step reads those that its tokens go to.
      dense_numbers: that every token is multiplied by.
      expert_numbers: that a token is multiplied by on average, of experts.
    """

    num_bytes: float = 0
    dense_bytes: float = 0
    expert_bytes: float = 0
    dense_numbers: float = 0
    expert_numbers: float = 0

    def __add__(self, other: "DeviceWeights") -> "DeviceWeights":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return DeviceWeights(*(a + b for a, b in pairs))


@dataclasses.dataclass(frozen=True)
class MeshWeights:
    """Of one device of a mesh.

    Attributes:
      embedding: what is looked up in and not multiplied by: tables of tokens and positions.
      head: what makes logits, and whatever is in no layer.
      stages: of each stage of a pipeline its layers; padding, which is zeros, is in `num_bytes` only.
    """

    embedding: DeviceWeights
    head: DeviceWeights
    stages: tuple[DeviceWeights, ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True)
class ModelWeights:
    """All parameters of a model.

    Attributes:
      config: the model's numbers.
      outer: those of no layer.
      layers: of each layer its own; layers that are alike have the same tuple.
    """

    config: ModelConfig
    outer: tuple[WeightShape, ...]
    layers: tuple[tuple[WeightShape, ...], ...]

    @classmethod
    def create(
        cls, config: ModelConfig, shapes: Iterable[WeightShape], like: Sequence[int] | None = None
    ) -> "ModelWeights":
        """From every parameter, with its whole path, of the layers that `like` has for each layer; None: of all."""
        outer: list[WeightShape] = []
        by_layer: dict[int, list[WeightShape]] = collections.defaultdict(list)
        for weight in shapes:
            first, _, rest = weight.path.partition("/")
            if first == LAYERS:
                layer, _, path = rest.partition("/")
                by_layer[int(layer)].append(weight._replace(path=path))
            else:
                outer.append(weight)
        kinds: dict[tuple[WeightShape, ...], tuple[WeightShape, ...]] = {}
        layers = (tuple(by_layer[layer]) for layer in like or range(config.num_layers))
        return cls(config, tuple(outer), tuple(kinds.setdefault(layer, layer) for layer in layers))

    @property
    def num_bytes(self) -> float:
        """Of all, each once."""
        return sum(w.num_bytes for w in (*self.outer, *(w for of in self.layers for w in of)))

    @property
    def num_params(self) -> int:
        return sum(math.prod(w.shape) for w in (*self.outer, *(w for of in self.layers for w in of)))

    def packed(self, itemsize: float) -> "ModelWeights":
        """With so many bytes for a number of whatever is a matrix or a table; scales beside them are not counted."""

        def pack(weights: tuple[WeightShape, ...]) -> tuple[WeightShape, ...]:
            return tuple(w._replace(itemsize=itemsize) if len(w.shape) > 1 else w for w in weights)

        kinds = {layer: pack(layer) for layer in dict.fromkeys(self.layers)}
        return ModelWeights(self.config, pack(self.outer), tuple(kinds[layer] for layer in self.layers))

    def on_mesh(self, splits: AxisSplits) -> MeshWeights:
        """Raises ValueError for what does not divide, or cannot be split."""
        check_mesh(self.config, splits)
        splits = splits.fitted(ax.VOCAB, self.config.vocab_size)
        num_kv_heads = num_sharded_kv_heads(self.config.num_kv_heads, splits)
        plan = StagePlan.create(self.config.num_layers, splits.axis_size(ax.STAGE))

        @functools.cache
        def of(weight: WeightShape) -> DeviceWeights:
            return _on_device(weight, splits, num_kv_heads)

        @functools.cache
        def total(weights: tuple[WeightShape, ...]) -> DeviceWeights:
            return sum(map(of, weights), DeviceWeights())

        of_stages = [DeviceWeights()] * plan.num_stages
        slots_bytes = 0.0
        for slot in plan.slots:
            kinds = dict.fromkeys(self.layers[layer] for layer in slot if layer is not None)
            slots_bytes += total(tuple(dict.fromkeys(weight for kind in kinds for weight in kind))).num_bytes
            for stage, layer in enumerate(slot):
                if layer is not None:
                    of_stages[stage] += total(self.layers[layer])
        embedding = total(tuple(weight for weight in self.outer if not weight.read_share))
        head = total(tuple(weight for weight in self.outer if weight.read_share))
        held = slots_bytes + embedding.num_bytes + head.num_bytes
        return MeshWeights(embedding, head, tuple(of_stages), math.ceil(held))


def _on_device(weight: WeightShape, splits: AxisSplits, num_kv_heads: int) -> DeviceWeights:
    numbers = math.prod(splits.shard_shape(weight.axes, weight.repeated(num_kv_heads).shape, weight.path))
    num_bytes = numbers * weight.itemsize
    if ax.EXPERTS in weight.axes:
        per_token = numbers * weight.read_share if weight.is_multiplied else 0
        return DeviceWeights(num_bytes, expert_bytes=num_bytes, expert_numbers=per_token)
    dense = DeviceWeights(num_bytes, dense_numbers=numbers if weight.is_multiplied else 0)
    return dataclasses.replace(dense, dense_bytes=num_bytes if weight.read_share else 0)
