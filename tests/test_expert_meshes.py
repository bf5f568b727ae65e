"""A mixture of experts over many devices: the same tokens as on one, whichever rules split tokens and experts.

And the same counts of tokens by expert, though some meshes have more padding than others.
"""

import dataclasses
import functools
import itertools
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import expert_placement
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.steps import Arrays, StepOutput
from sharding_rules import axes as ax
from tests.long_campaign import chosen
from tests.parity import driver, recipe

FAMILIES = ("mixtral", "qwen3_moe", "gpt_oss", "deepseek")
MESHES = ("expert:2", "expert:4", "expert:8", "data:2,expert:2", "expert:2,tensor:2", "data:2,expert:2,context:2")
CASES = chosen(
    [*itertools.product(FAMILIES, MESHES, ("inference", "expert_sums"))],
    ("mixtral", "data:2,expert:2", "inference"),
    ("gpt_oss", "expert:2,tensor:2", "expert_sums"),
    ("deepseek", "expert:4", "inference"),
)
SHAPES = driver.Shapes(rows=2, max_len=64, chunk=32, num_steps=0)
LOOP = driver.Shapes(rows=2, max_len=64, chunk=32, num_steps=4)  # of decode steps, too
PROMPT_LENGTHS = (1, 33, 5, 40, 17)
NUM_TOKENS = 16

Run = tuple[list[list[int]], np.ndarray]  # tokens, and int [layers, E], how many tokens each expert got


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tmp_path_factory.mktemp("experts")


@functools.cache
def model_dir(directory: pathlib.Path, family: str) -> pathlib.Path:
    config = recipe.first_config(family)
    return recipe.write_model(directory / family, config, recipe.weights(family, config))


@functools.cache
def generate(directory: pathlib.Path, family: str, mesh: str, sharding: str) -> Run:
    return run(*driver.load(model_dir(directory, family), mesh, sharding))


def with_copies(directory: pathlib.Path, family: str, mesh: str, num_further: int) -> ModelDefinition:
    """With the slots that are proposed for what was counted on one device."""
    config, partitioner = driver.read_config(model_dir(directory, family)), Partitioner.create(mesh)
    assert config.moe is not None
    counts = dict(zip(config.expert_layers, generate(directory, family, "", "auto")[1].tolist(), strict=True))
    num_devices = partitioner.num_shards(ax.EXPERTS)
    proposed = expert_placement.propose(counts, num_devices=num_devices, num_further=num_further)
    placements = tuple(proposed.get(layer, ()) for layer in range(config.num_layers))
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, placements=placements))
    return ModelDefinition.create(config, partitioner, jnp.dtype("float32"))


def run(definition: ModelDefinition, weights: Arrays, shapes: driver.Shapes = SHAPES) -> Run:
    with driver.greedy_only():
        runner = driver.make_runner(definition, weights, shapes, counts_experts=True)
        runner.compile_all()
    counts, dispatch = [], runner.dispatch

    def counting(*args: Any) -> StepOutput:
        output = dispatch(*args)
        counts.append(np.asarray(output.expert_counts).sum(axis=0))
        return output

    prompts = [recipe.prompt(length, 128, seed) for seed, length in enumerate(PROMPT_LENGTHS)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "dispatch", counting)
        tokens = driver.generate(runner, shapes, prompts, NUM_TOKENS)
    return tokens, np.sum(counts, axis=0)


def check_same(found: Run, wanted: Run) -> None:
    assert found[0] == wanted[0]
    np.testing.assert_array_equal(found[1], wanted[1])


@pytest.mark.parametrize(("family", "mesh", "sharding"), CASES)
def test_same_as_on_one_device(directory: pathlib.Path, family: str, mesh: str, sharding: str):
    check_same(generate(directory, family, mesh, sharding), generate(directory, family, "", "auto"))


@pytest.mark.parametrize("family", chosen(FAMILIES, "mixtral"))
def test_every_token_counts_once_for_each_of_its_experts(directory: pathlib.Path, family: str):
    """But the last of an output, which the model never reads."""
    _, counts = generate(directory, family, "", "auto")
    config = driver.load_definition(model_dir(directory, family)).decoder_config
    num_read = sum(PROMPT_LENGTHS) + len(PROMPT_LENGTHS) * (NUM_TOKENS - 1)
    assert config.moe is not None
    assert counts.shape == (len(config.expert_layers), config.moe.num_experts)
    np.testing.assert_array_equal(counts.sum(axis=1), num_read * config.moe.num_experts_per_token)


def test_counts_of_a_loop_of_decode_steps(directory: pathlib.Path):
    """Rows that have ended, or are none, count no more."""
    wanted = generate(directory, "mixtral", "", "auto")
    check_same(run(*driver.load(model_dir(directory, "mixtral"), "expert:2"), LOOP), wanted)


@pytest.mark.parametrize(("family", "mesh"), chosen([*itertools.product(FAMILIES, MESHES)], ("gpt_oss", "expert:4")))
def test_the_same_with_experts_in_several_slots(directory: pathlib.Path, family: str, mesh: str):
    definition = with_copies(directory, family, mesh, num_further=8)
    found = run(definition, load_weights(model_dir(directory, family), definition))
    check_same(found, generate(directory, family, "", "auto"))
