"""Layers in slots: each layer once, in order over the stages, and no more slots than the longest stage has layers."""

import pytest

from jaxinfer.integers import cdiv
from jaxinfer.stages import StagePlan


def test_the_example_of_the_docstring():
    plan = StagePlan.create(5, 2)
    assert plan.slots == ((0, 2), (1, 3), (None, 4))
    assert [plan.stage_of(layer) for layer in range(5)] == [0, 0, 1, 1, 1]
    assert plan.like(2) == (4, 4)


@pytest.mark.parametrize("num_stages", [1, 2, 3, 4, 7, 8])
def test_every_layer_is_once_on_a_stage_in_order(num_stages: int):
    for num_layers in range(num_stages, 4 * num_stages + 1):
        plan = StagePlan.create(num_layers, num_stages)
        by_stage = [[layers[stage] for layers in plan.slots] for stage in range(num_stages)]
        layers = [layer for of_stage in by_stage for layer in of_stage if layer is not None]
        assert layers == [*range(num_layers)]
        assert (plan.num_stages, plan.num_layers) == (num_stages, num_layers)
        assert len(plan.slots) == cdiv(num_layers, num_stages)
        assert all(None not in of_stage[:-1] for of_stage in by_stage), "padding is last, and one layer at most"
