"""A model of fewer layers, whose program has all that the program of the whole model has. Host only.

Layers differ by their windows, and in having experts or an MLP; all of a kind are compiled to the same operations. In a
pipeline a slot for layers has one on each stage (`stages`), so kinds are those of slots. At least two are compiled, so
that there is a layer behind another.
"""

import dataclasses
from typing import Any

from jaxinfer.config import ModelConfig
from jaxinfer.stages import StagePlan


@dataclasses.dataclass(frozen=True)
class FewLayers:
    """The smaller model.

    Attributes:
      config: with so many layers on each stage as `counts` has numbers.
      counts: of each of its slots, how many of the whole model's it stands for.
    """

    config: ModelConfig
    counts: tuple[int, ...]


def few_layers(config: ModelConfig, num_stages: int, *, all_layers: bool = False) -> FewLayers:
    """One slot of each kind, in the order in which the model has them; two of the only kind, if there is one.

    Windows (4, None, 4, None, 4) without stages: layers of windows 4 and None, for 3 and 2. With `all_layers`, the
    model as it is.
    """
    plan = StagePlan.create(config.num_layers, num_stages)
    num_slots = len(plan.slots)
    if all_layers:
        return FewLayers(config, (1,) * num_slots)
    by_kind: dict[Any, list[int]] = {}
    for slot in range(num_slots):
        by_kind.setdefault(tuple(_kind(config, layer) for layer in plan.like(slot)), []).append(slot)
    chosen = {slots[0]: len(slots) for slots in by_kind.values()}
    if len(chosen) == 1 < num_slots:
        chosen = {0: 1, 1: num_slots - 1}
    layers = [plan.like(slot)[stage] for stage in range(num_stages) for slot in chosen]
    return FewLayers(_of_layers(config, layers), tuple(chosen.values()))


def _kind(config: ModelConfig, layer: int) -> tuple[Any, ...]:
    """Equal for layers that are compiled alike."""
    placements = config.moe.placements if config.moe is not None else ()
    return config.window(layer), config.has_experts(layer), placements[layer] if placements else ()


def _of_layers(config: ModelConfig, layers: list[int]) -> ModelConfig:
    """With these of its layers, each as often as it is named."""
    moe = config.moe
    if moe is not None:
        dense = frozenset(new for new, old in enumerate(layers) if old in moe.dense_layers)
        placements = tuple(moe.placements[old] for old in layers) if moe.placements else ()
        moe = dataclasses.replace(moe, dense_layers=dense, placements=placements)
    windows = tuple(config.windows[old] for old in layers) if config.windows else ()
    return dataclasses.replace(config, num_layers=len(layers), windows=windows, moe=moe)
