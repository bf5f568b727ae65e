"""Which expert is in which slot of the devices: a file that an engine reads, and a proposal from what it counted.

As DeepSeek-V3 does (arXiv:2412.19437, section 3.4), the experts with the most tokens get further slots, on other
devices, and the slots are dealt so that devices get about as many tokens each. Host only.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence

from jaxinfer.config import ModelConfig

Placement = tuple[int, ...]  # of one layer: the expert in each slot; every device has as many, the first the first


def read(path: pathlib.Path, config: ModelConfig, num_devices: int) -> tuple[Placement, ...]:
    """Of each layer of the model; () where it has no experts.

    The file is JSON: a list, for all layers, or lists by the numbers of layers, `{"0": [0, 1, 2, 3, 0, 2], ...}`;
    layers that are not there have each expert once. Raises ValueError for what is neither, and for a layer that lacks
    an expert, has an unknown one, or does not divide over `num_devices`.
    """
    assert config.moe is not None
    flag = f"--expert_placement={path}"
    if num_devices == 1:
        raise ValueError(f"{flag}: without expert:2 or more in --mesh all experts are on every device; leave it out")
    by_layer = _parse(path, flag, config.expert_layers)
    once = tuple(range(config.moe.num_experts))
    placements = [by_layer.get(layer, once) if config.has_experts(layer) else () for layer in range(config.num_layers)]
    for layer in config.expert_layers:
        _check(placements[layer], config.moe.num_experts, num_devices, f"{flag}: layer {layer}")
    return tuple(placements)


def write(path: pathlib.Path, placement: Mapping[int, Placement]) -> None:
    """What `read` takes, by layer."""
    lines = [f'  "{layer}": {json.dumps([*slots])}' for layer, slots in sorted(placement.items())]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def propose(counts: Mapping[int, Sequence[int]], *, num_devices: int, num_further: int) -> dict[int, Placement]:
    """A placement with `num_further` slots more than experts, from the tokens of each expert by layer.

    Slot by slot the expert with the most tokens in each of its slots gets one more, up to one on each device. Then,
    from the slot with the most tokens on, each goes to the device with the fewest that has room, and not yet that
    expert. Raises ValueError for slots that do not divide over the devices, or more than these could use.
    """
    return {layer: _propose(of_layer, num_devices, num_further) for layer, of_layer in counts.items()}


def _propose(counts: Sequence[int], num_devices: int, num_further: int) -> Placement:
    num_experts, num_slots = len(counts), len(counts) + num_further
    if num_slots % num_devices or num_slots > num_experts * num_devices:
        raise ValueError(
            f"{num_experts} experts and {num_further} further slots do not divide over {num_devices} devices with each "
            f"expert at most once on each; use {-num_experts % num_devices} and a multiple of {num_devices} more, "
            f"at most {num_experts * (num_devices - 1)}"
        )
    copies = [1] * num_experts
    load = lambda expert: counts[expert] / copies[expert]  # noqa: E731
    for _ in range(num_further):
        copies[max((e for e in range(num_experts) if copies[e] < num_devices), key=load)] += 1
    of_device: list[list[int]] = [[] for _ in range(num_devices)]
    for expert in sorted(range(num_experts), key=load, reverse=True):
        for _ in range(copies[expert]):
            _with_room(of_device, expert, num_slots // num_devices, load).append(expert)
    return tuple(expert for experts in of_device for expert in sorted(experts))


def _with_room(of_device: list[list[int]], expert: int, num_slots: int, load: Callable[[int], float]) -> list[int]:
    """The device with the fewest tokens, of those that lack the expert if there are such."""
    free = [experts for experts in of_device if len(experts) < num_slots]
    return min(free, key=lambda experts: (expert in experts, sum(map(load, experts))))


def _parse(path: pathlib.Path, flag: str, expert_layers: tuple[int, ...]) -> dict[int, Placement]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag}: cannot be read as JSON: {error}") from None
    if isinstance(found, list):
        found = {str(layer): found for layer in expert_layers}
    if not isinstance(found, dict) or not all(_is_slots(slots) for slots in found.values()):
        raise ValueError(f"{flag}: must be a list of experts' numbers, or such lists by layer")
    if unknown := found.keys() - set(map(str, expert_layers)):
        raise ValueError(f"{flag}: has layers {sorted(unknown)}; those with experts are {[*expert_layers]}")
    return {int(layer): tuple(slots) for layer, slots in found.items()}


def _is_slots(slots: object) -> bool:
    return isinstance(slots, list) and all(type(expert) is int for expert in slots)


def _check(placement: Placement, num_experts: int, num_devices: int, where: str) -> None:
    if unknown := sorted(set(placement) - set(range(num_experts))):
        raise ValueError(f"{where} names the experts {unknown}; the model has 0 to {num_experts - 1}")
    if missing := sorted(set(range(num_experts)) - set(placement)):
        raise ValueError(f"{where} lacks the experts {missing}; each must be in a slot")
    if further := -len(placement) % num_devices:
        raise ValueError(
            f"{where} has {len(placement)} slots, which do not divide over expert:{num_devices}; add {further}"
        )
