"""One model over many devices: the same tokens as on one, and in the compiled step no collective beyond the plan."""

import pathlib

import jax.numpy as jnp
import pytest

from jaxinfer.batch import StepShape
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.sampler_lowerings import SamplerLowerings
from jaxinfer.sampling_params import MAX_LOGPROBS
from sharding_rules import axes as ax
from tests.compiled_steps import CONFIG, SHAPES, Step, collectives, compile_step
from tests.long_campaign import chosen
from tests.parity import driver, recipe

MESHES = chosen(
    ("data:2", "data:8", "tensor:2", "tensor:4", "tensor:8", "data:2,tensor:4"), "data:8", "tensor:8", "data:2,tensor:4"
)
PROMPT_LENGTHS = (1, 4, 15, 17, 33, 64, 70, 100, 5)  # more than the slots of some meshes: requests also queue
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return recipe.write_model(tmp_path_factory.mktemp("meshes") / "model", CONFIG, recipe.weights("llama", CONFIG))


def generate(model_dir: pathlib.Path, mesh: str) -> list[list[int]]:
    runner = driver.make_runner(*driver.load(model_dir, mesh), SHAPES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerLowerings, "all", lambda *_: {})  # tests/test_extras_on_meshes.py has them
        runner.compile_all()
    prompts = [recipe.prompt(length, 128, seed) for seed, length in enumerate(PROMPT_LENGTHS)]
    return driver.generate(runner, SHAPES, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def on_one_device(model_dir: pathlib.Path) -> list[list[int]]:
    return generate(model_dir, "")


@pytest.mark.parametrize("mesh", MESHES)
def test_same_tokens_as_on_one_device(mesh: str, model_dir: pathlib.Path, on_one_device: list[list[int]]):
    assert generate(model_dir, mesh) == on_one_device


def expected_collectives(step: Step, num_layers: int, mesh: str) -> list[tuple[str, int]]:
    if ax.TENSOR not in mesh:
        return []
    return [("all-gather", step.logits_size)] + [("all-reduce", step.activation_size)] * (1 + 2 * num_layers)


@pytest.mark.parametrize("unsplit", [ax.MLP, ax.VOCAB])
def test_a_collective_more_or_less_is_seen(unsplit: str):
    """The twin of the count below: an MLP left whole needs no all-reduce, a vocabulary left whole no embedding's."""
    step = compile_step(2, "tensor:2", unsplit)
    assert sorted(step.large) != expected_collectives(step, 2, "tensor:2")


@pytest.mark.parametrize("mesh", MESHES)
def test_collectives_of_a_decode_step(mesh: str):
    """With `tensor` two all-reduces a layer, after attention and after the MLP; with `data` alone none.

    One more all-reduce outside the layers: a token's embedding is found on the device that holds its part of the
    vocabulary. Everything else is a few numbers per row: the best logit of each part of the vocabulary and its
    place, whether all logits are finite, and the tokens for every host. In particular no weight and no page
    travels; logits do only in the branch that a greedy batch never takes.
    """
    steps = {num_layers: compile_step(num_layers, mesh) for num_layers in (2, 4)}
    per_layer = 2 if ax.TENSOR in mesh else 0
    for num_layers, step in steps.items():
        assert sorted(step.large) == expected_collectives(step, num_layers, mesh)
        assert step.logits_stay_in_branch
    assert len(steps[4].collectives) - len(steps[2].collectives) == 2 * per_layer


@pytest.mark.parametrize("mesh", ["data:2", "tensor:2", "data:2,tensor:4"])
def test_a_step_that_gives_its_logits_out_moves_no_more(mesh: str):
    step = compile_step(2, mesh, num_steps=1)
    assert sorted(step.large) == expected_collectives(step, 2, mesh) and step.logits_stay_in_branch


@pytest.mark.parametrize("mesh", ["data:2", "data:8", "tensor:2", "data:2,tensor:4"])
def test_extras_move_logits_once_and_nothing_else(mesh: str):
    """With `tensor` the parts of the logits come together. Beside that only what the host reads travels."""
    config = llama.parse_config(HFConfig(CONFIG))
    definition = ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype("float32"))
    programs = driver.step_programs(definition, SHAPES)
    batch = programs.batch(StepShape(0, 0, SHAPES.rows, SHAPES.buckets().pages[0], 1))
    num_shards = batch.slots.shape[0]
    moved = {}
    for name, program in programs.sampler.all([batch], definition.abstract_arrays).items():
        moved[name] = collectives(program.lower().compile().as_text() or "")
    for name, num_tokens in ((SHAPES.rows, SHAPES.rows), ("score", SHAPES.chunk)):
        for_host = [("all-gather", num_shards * num_tokens * width) for width in (1, MAX_LOGPROBS)]
        of_logits = [collective for collective in moved[name] if collective not in for_host]
        num_logits = min(num_tokens, 32) * config.vocab_size  # of a block
        assert of_logits == [("all-gather", num_logits)] * (ax.TENSOR in mesh), name
    assert moved["load"] == []


@pytest.mark.parametrize("chunk_tokens", [0, SHAPES.chunk], ids=["decode", "chunk"])
@pytest.mark.parametrize("mesh", ["", *MESHES])
def test_cache_is_written_in_place(mesh: str, chunk_tokens: int):
    step = compile_step(2, mesh, chunk_tokens=chunk_tokens)
    slot_bytes = SHAPES.rows * (4 + 1)  # a token and a flag each
    assert step.alias_bytes == step.cache_bytes + slot_bytes
    assert not step.cache_copies
