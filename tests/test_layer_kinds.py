"""The few layers that are compiled in place of all: of each kind one."""

import dataclasses

import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.planning.layer_kinds import few_layers
from jaxinfer.stages import StagePlan
from tests import published

LLAMA = published.read("llama_3_1_8b_instruct")
GEMMA = published.read("gemma_3_1b_it")  # 26 layers, every sixth without a window
DEEPSEEK = published.read("deepseek_v2_lite")  # 27 layers, the first without experts


def kinds(config: ModelConfig, num_stages: int) -> list[tuple]:
    """Of each slot, its windows and experts."""
    plan = StagePlan.create(config.num_layers, num_stages)
    slots = [plan.like(slot) for slot in range(len(plan.slots))]
    return [tuple((config.window(layer), config.has_experts(layer)) for layer in layers) for layers in slots]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 5])
@pytest.mark.parametrize("config", [LLAMA, GEMMA, DEEPSEEK], ids=lambda config: config.family)
def test_every_kind_of_slot_stands_for_those_like_it(config: ModelConfig, num_stages: int):
    few = few_layers(config, num_stages)
    of_model, of_few = kinds(config, num_stages), kinds(few.config, num_stages)
    assert len(of_few) == len(few.counts) and few.config.num_layers == num_stages * len(of_few)
    stood_for = [kind for kind, count in zip(of_few, few.counts, strict=True) for _ in range(count)]
    assert sorted(of_model, key=str) == sorted(stood_for, key=str)


@pytest.mark.parametrize(
    ("config", "num_stages", "counts"),
    [
        (LLAMA, 1, (1, 31)),
        (LLAMA, 8, (1, 3)),
        (LLAMA, 32, (1,)),
        (GEMMA, 1, (22, 4)),
        (DEEPSEEK, 1, (1, 26)),
        (published.read("deepseek_v3"), 1, (3, 58)),
        (DEEPSEEK, 2, (1, 13)),
    ],
)
def test_so_many_of_each(config: ModelConfig, num_stages: int, counts: tuple[int, ...]):
    assert few_layers(config, num_stages).counts == counts


def test_all_layers_are_the_model_as_it_is():
    few = few_layers(GEMMA, 1, all_layers=True)
    assert few.config is GEMMA and few.counts == (1,) * 26


def test_experts_that_are_placed_otherwise_are_another_kind():
    moe, config = DEEPSEEK.moe, DEEPSEEK
    assert moe is not None
    once = tuple(range(moe.num_experts))
    placements = ((), once, once[::-1], *[once] * 24)
    placed = dataclasses.replace(config, moe=dataclasses.replace(moe, placements=placements))
    few = few_layers(placed, 1)
    assert few.counts == (1, 25, 1)
    assert few.config.moe is not None and few.config.moe.placements == ((), once, once[::-1])
