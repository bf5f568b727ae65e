"""Which layers each stage of a pipeline has. Host only.

Every stage runs the same program, over as many slots for layers as the longest stage has layers. Layers 0 to 4 on two
stages: slot 0 is layer 0 on stage 0 and layer 2 on stage 1, slot 1 is layers 1 and 3, slot 2 is padding and layer 4.
The weights of padding are zero, so that it adds nothing; it costs no time, for the other stages compute theirs, but the
memory of a layer. Its tokens do not count as real: the router's zeros would send all of them to the first experts.
"""

import dataclasses
import itertools

Layers = tuple[int, ...]  # of a slot, on each stage; without stages one


@dataclasses.dataclass(frozen=True)
class StagePlan:
    """Consecutive layers on each stage, as evenly as they divide; the last stages have one more.

    Attributes:
      slots: of each slot the layer on each stage; None: padding.
    """

    slots: tuple[tuple[int | None, ...], ...]

    @classmethod
    def create(cls, num_layers: int, num_stages: int) -> "StagePlan":
        """Needs a layer for each stage."""
        starts = [stage * num_layers // num_stages for stage in range(num_stages + 1)]
        by_stage = [[*range(*ends)] for ends in itertools.pairwise(starts)]
        num_slots = max(map(len, by_stage))
        padded = [[*layers, *[None] * (num_slots - len(layers))] for layers in by_stage]
        return cls(tuple(zip(*padded, strict=True)))

    @property
    def num_stages(self) -> int:
        return len(self.slots[0])

    @property
    def num_layers(self) -> int:
        """Those that are no padding."""
        return sum(layer is not None for layers in self.slots for layer in layers)

    def stage_of(self, layer: int) -> int:
        return self.place_of(layer)[0]

    def place_of(self, layer: int) -> tuple[int, int]:
        """Its stage, and its slot there."""
        (place,) = ((layers.index(layer), slot) for slot, layers in enumerate(self.slots) if layer in layers)
        return place

    def like(self, slot: int) -> Layers:
        """Of each stage the layer that the slot computes there; padding computes as another stage's."""
        layers = [layer for layer in self.slots[slot] if layer is not None]
        return tuple(layers[0] if layer is None else layer for layer in self.slots[slot])


_MOST_PER_STAGE = 4  # microbatches of prompts: 4 p of them keep p stages busy in 4 p of 5 p - 1 turns


def num_microbatches(num_stages: int, num_tokens: int, platform: str) -> int:
    """Of a step that prefills so many tokens of each data shard; 0: none. `platform` is that of the devices."""
    if num_stages == 1:
        return 1
    least = 32 if platform == "cpu" else 256  # tokens of a microbatch of more than p: fewer take a stage no less time
    return num_stages * min(_MOST_PER_STAGE, max(1, num_tokens // (num_stages * least)))
