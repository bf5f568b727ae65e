"""A model of fewer layers, whose program has all that the program of the whole model has. Host only.

Layers differ by their windows, and in having experts or an MLP; all of a kind are compiled to the same operations. In a
pipeline a slot for layers has one on each stage (`stages`), so kinds are those of slots.
"""

import dataclasses
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.stages import StagePlan

_LEAST_SLOTS = 2  # so that there is a layer behind another


@dataclasses.dataclass(frozen=True)
class FewLayers:
    """The smaller model.

    Attributes:
      config: with so many layers on each stage as `counts` has numbers.
      counts: of each of its slots, how many of the whole model's it stands for.
    """

    config: ModelConfig
    counts: tuple[int, ...]


def few_layers(config: ModelConfig, num_stages: int) -> FewLayers:
    """One slot of each kind, in the order in which the model has them; two of the only kind, if there is one.

    Windows (4, None, 4, None, 4) without stages: layers of windows 4 and None, for 3 and 2.
    """
    plan = StagePlan.create(config.num_layers, num_stages)
    slots = [plan.like(slot) for slot in range(len(plan.slots))]
    by_kind: dict[Any, list[tuple[int, ...]]] = {}
    for layers in slots:
        by_kind.setdefault(tuple((config.window(layer), config.has_experts(layer)) for layer in layers), []).append(layers)
    chosen = [(of_kind[0], len(of_kind)) for of_kind in by_kind.values()]
    if len(chosen) < min(_LEAST_SLOTS, len(slots)):
        (layers, count) = chosen[0]
        chosen = [(layers, 1), (layers, count - 1)]
    layers = [layers[stage] for stage in range(num_stages) for layers, _ in chosen]
    return FewLayers(_of_layers(config, layers), tuple(count for _, count in chosen))


def _of_layers(config: ModelConfig, layers: list[int]) -> ModelConfig:
    """With these of its layers, each as often as it is named."""
    moe = config.moe
    if moe is not None:
        dense = frozenset(new for new, old in enumerate(layers) if old in moe.dense_layers)
        placements = tuple(moe.placements[old] for old in layers) if moe.placements else ()
        moe = dataclasses.replace(moe, dense_layers=dense, placements=placements)
    windows = tuple(config.windows[old] for old in layers) if config.windows else ()
    return dataclasses.replace(config, num_layers=len(layers), windows=windows, moe=moe)
