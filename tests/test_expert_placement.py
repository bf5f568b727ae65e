"""Experts in several slots: how a placement is read, refused and proposed, and that a model with one is the same."""

import dataclasses
import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxinfer import expert_placement, models
from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

DENSE_FIRST = "deepseek"  # its layers 1 and 2 have 16 experts, layer 0 has none


def config(family: str = DENSE_FIRST) -> ModelConfig:
    module = models.get(family)
    return module.parse_config(HFConfig(next(iter(module.TINY_CONFIGS.values()))))


def read(path: pathlib.Path, content: Any, num_devices: int = 2) -> tuple[expert_placement.Placement, ...]:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return expert_placement.read(path, config(), num_devices)


def test_one_list_is_for_all_layers_with_experts(tmp_path: pathlib.Path):
    slots = (*range(16), 3, 3)
    assert read(tmp_path / "file.json", slots) == ((), slots, slots)


def test_layers_that_are_not_named_have_each_expert_once(tmp_path: pathlib.Path):
    slots = (*reversed(range(16)), 3, 5)
    assert read(tmp_path / "file.json", {"2": slots}) == ((), tuple(range(16)), slots)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read as JSON: "),
        (7, "must be a list of experts' numbers, or such lists by layer"),
        ({"1": [0, 1.5]}, "must be a list of experts' numbers, or such lists by layer"),
        ({"1": [True] * 16}, "must be a list of experts' numbers, or such lists by layer"),
        ({"0": [*range(16)], "9": []}, "has layers ['0', '9']; those with experts are [1, 2]"),
        ({"1": [*range(17), -1]}, "layer 1 names the experts [-1, 16]; the model has 0 to 15"),
        ({"2": [0, 1, 2, 3] * 4}, "layer 2 lacks the experts [4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]"),
        ({"2": [*range(16), 5]}, "layer 2 has 17 slots, which do not divide over expert:2; add 1"),
    ],
)
def test_what_is_refused(content: Any, message: str, tmp_path: pathlib.Path):
    path = tmp_path / "file.json"
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        read(path, content)
    assert str(caught.value).startswith(f"--expert_placement={path}: {message}")


def test_a_file_that_is_not_there_is_named(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"--expert_placement=\S*nowhere: cannot be read as JSON: .*No such file"):
        expert_placement.read(tmp_path / "nowhere", config(), 2)


def test_without_devices_to_choose_from_it_is_refused(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match="without expert:2 or more in --mesh all experts are on every device"):
        read(tmp_path / "file.json", [*range(16)], num_devices=1)


def test_what_is_proposed_can_be_read(tmp_path: pathlib.Path):
    counts = {1: [*range(16)], 2: [100, *[1] * 15]}
    proposed = expert_placement.propose(counts, num_devices=4, num_further=4)
    expert_placement.write(tmp_path / "file.json", proposed)
    assert expert_placement.read(tmp_path / "file.json", config(), 4) == ((), proposed[1], proposed[2])


def test_the_expert_with_the_most_tokens_goes_to_every_device_and_the_others_are_dealt():
    proposed = expert_placement.propose({0: [90, 20, 20, 30]}, num_devices=2, num_further=2)[0]
    assert proposed == (0, 1, 3, 0, 2, 3)  # the first is everywhere then, so the other slot is for the fourth: 80 each
    with pytest.raises(ValueError, match=r"4 experts and 1 further slots do not divide over 2 devices .* at most 4"):
        expert_placement.propose({0: [1, 1, 1, 1]}, num_devices=2, num_further=1)
    with pytest.raises(ValueError, match="use 0 and a multiple of 2 more, at most 4"):
        expert_placement.propose({0: [1, 1, 1, 1]}, num_devices=2, num_further=6)


def test_a_device_has_no_expert_twice_while_another_lacks_it():
    """Though all are as busy."""
    assert expert_placement.propose({0: [0] * 4}, num_devices=2, num_further=4)[0] == (0, 1, 2, 3) * 2


def busiest(counts: list[int], placement: expert_placement.Placement, num_devices: int) -> float:
    """Tokens of the device with the most, in terms of what all would have were they alike."""
    of_slot = [counts[expert] / placement.count(expert) for expert in placement]
    of_device = np.array(of_slot).reshape(num_devices, -1).sum(axis=1)
    return of_device.max() / of_device.mean()


@given(st.lists(st.integers(0, 1000), min_size=8, max_size=8), st.sampled_from([0, 4, 8, 24]))
def test_every_expert_has_a_slot_and_at_most_one_for_each_device(counts: list[int], num_further: int):
    placement = expert_placement.propose({0: counts}, num_devices=4, num_further=num_further)[0]
    assert len(placement) == 8 + num_further and set(placement) == set(range(8))
    assert max(map(placement.count, placement)) <= 4


def test_devices_get_about_as_many_tokens_each():
    """Of 64 experts whose tokens fall off as 1 / rank, on 8 devices: nearly twice what is due, before."""
    rng, once = np.random.default_rng(0), tuple(range(64))
    for _ in range(20):
        counts = (10_000 / rng.permutation(np.arange(1, 65))).astype(int).tolist()
        proposed = expert_placement.propose({0: counts}, num_devices=8, num_further=16)[0]
        assert busiest(counts, proposed, 8) < 1.05 and busiest(counts, once, 8) > 1.4


def test_stages_where_a_dense_layer_is_beside_one_with_experts_take_it():
    """Layers 0 and 1 are in one slot, with layer 2 behind; and layers of one slot need as many experts' slots."""
    partitioner = Partitioner.abstract("stage:2,expert:2")
    slots = (*range(16), 3, 3)

    def shapes(*placements: expert_placement.Placement) -> dict[str, tuple[int, ...]]:
        model = config()
        assert model.moe is not None
        moe = dataclasses.replace(model.moe, placements=placements)
        model = dataclasses.replace(model, num_layers=len(placements), moe=moe)
        params = ModelDefinition.create(model, partitioner, jnp.dtype("float32")).params
        return {spec.path: spec.shape for spec in params}

    path, placed = "layers/{}/mlp/experts/up", shapes((), slots, slots)
    assert placed[path.format(1)][0] == placed[path.format(2)][0] == len(slots)
    assert shapes((), slots, slots, slots)[path.format(3)][0] == len(slots)
    with pytest.raises(ValueError, match=r"layer 1 has 18, layer 3 has 16 slots; pipeline stages need equally many"):
        shapes((), slots, slots, tuple(range(16)))
