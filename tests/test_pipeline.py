"""Layers on pipeline stages: the same tokens as on one device, in as many ticks as the arithmetic says."""

import collections
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import load_file

from jaxinfer.checkpoint import orbax_weights
from jaxinfer.checkpoint.conversion import Source, convert
from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.layers.experts import Experts
from jaxinfer.microbatches import Work
from sharding_rules import axes as ax
from tests.long_campaign import chosen
from tests.parity import driver, recipe

MESHES = chosen(
    ("stage:2", "stage:4", "stage:8", "stage:4,tensor:2", "data:2,stage:2", "data:2,stage:2,tensor:2"),
    "stage:8",
    "stage:4,tensor:2",
)
CONFIG = recipe.tiny_config("llama", "gqa") | {"num_hidden_layers": 9}  # which none of these stages divides
SHAPES = driver.Shapes(rows=4, max_len=128, chunk=64, num_steps=4)
PROMPT_LENGTHS = (1, 4, 15, 17, 33, 64, 70, 100, 5)  # more than the slots of some meshes: requests also queue
NUM_TOKENS = 12


def write(directory: pathlib.Path, family: str, config: dict[str, Any]) -> pathlib.Path:
    return recipe.write_model(directory / "model", config, recipe.weights(family, config))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write(tmp_path_factory.mktemp("pipeline"), "llama", CONFIG)


def generate(model_dir: pathlib.Path, mesh: str, shapes: driver.Shapes = SHAPES) -> list[list[int]]:
    return driver.generate_on(model_dir, mesh, shapes, PROMPT_LENGTHS, NUM_TOKENS)


@pytest.fixture(scope="module")
def on_one_device(model_dir: pathlib.Path) -> list[list[int]]:
    return generate(model_dir, "")


@pytest.mark.parametrize("mesh", MESHES)
def test_same_tokens_as_on_one_device(mesh: str, model_dir: pathlib.Path, on_one_device: list[list[int]]):
    assert generate(model_dir, mesh) == on_one_device


@pytest.mark.parametrize(
    ("family", "num_layers"),
    chosen(
        [
            ("deepseek", 3),  # a dense layer is in a slot with one of experts, whose parameters differ
            ("gemma3", 3),  # a layer with a window and its own rotation is in a slot with one without
        ],
        ("deepseek", 3),
    ),
)
def test_stages_whose_layers_differ(family: str, num_layers: int, tmp_path: pathlib.Path):
    config = recipe.first_config(family) | {"num_hidden_layers": num_layers, "vocab_size": 131}  # does not divide
    if "layer_types" in config:
        config["layer_types"] = ["sliding_attention", "sliding_attention", "full_attention"]
    shapes = driver.Shapes(rows=4, max_len=128, chunk=64, num_steps=0)
    model_dir = write(tmp_path, family, config)
    assert generate(model_dir, "stage:2", shapes) == generate(model_dir, "", shapes)


def test_bfloat16(model_dir: pathlib.Path):
    """Stages beside another axis: XLA's CPU compiler aborts on the sum of bfloat16 over one axis of several."""
    definition = driver.load_definition(model_dir, "data:2,stage:2", dtype="bfloat16")
    shapes = driver.Shapes(rows=4, max_len=128, chunk=64, num_steps=0)
    programs = driver.step_programs(definition, shapes)
    (shape,) = shapes.buckets(num_shards=2).shapes()
    programs.lowered(shape).compile()


def test_padding_computes_no_experts(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Three layers on two stages: of four layers that are computed one is padding, whose tokens are none."""
    seen: collections.Counter[tuple[int, bool]] = collections.Counter()
    compute = Experts.__call__

    def counting(experts: Experts, x: jax.Array, picked: jax.Array, weights: jax.Array, is_valid: jax.Array):
        record = lambda stage, is_any: seen.update([(int(stage), bool(is_any))])  # noqa: E731
        jax.debug.callback(record, lax.axis_index(ax.STAGE), jnp.any(is_valid))
        return compute(experts, x, picked, weights, is_valid)

    monkeypatch.setattr(Experts, "__call__", counting)
    config = recipe.first_config("mixtral") | {"num_hidden_layers": 3}
    shapes = driver.Shapes(rows=4, max_len=128, chunk=64, num_steps=0)
    driver.generate_on(write(tmp_path, "mixtral", config), "stage:2", shapes, (4,), 3)
    jax.effects_barrier()
    assert 2 * seen[0, True] == seen[1, True] > 0


@pytest.mark.parametrize(("mesh", "num_stages"), chosen([("stage:2", 2), ("stage:4", 4)], ("stage:4", 4)))
def test_ticks(mesh: str, num_stages: int, model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """N steps of a dispatch take N * m + p - 1 ticks, in N * m of which a stage works; and not N * (m + p - 1).

    A prompt of 64 tokens, in 32-token microbatches but at least p of them, takes m + p - 1.
    """
    ticks: collections.Counter[tuple[int, bool]] = collections.Counter()
    masked = Work.masked

    def counting(work: Work, counts: jax.Array) -> Work:
        stage = lax.axis_index(ax.STAGE)
        jax.debug.callback(lambda stage, is_live: ticks.update([(int(stage), bool(is_live))]), stage, counts)
        return masked(work, counts)

    monkeypatch.setattr(Work, "masked", counting)
    shapes = driver.Shapes(rows=4, max_len=128, chunk=64, num_steps=16)
    runner = driver.make_runner(*driver.load(model_dir, mesh), shapes)
    with driver.greedy_only():
        runner.compile_all()
    driver.generate(runner, shapes, [recipe.prompt(60, 128, seed=0)], 1 + shapes.num_steps)
    jax.effects_barrier()
    num_microbatches = num_stages
    live = num_microbatches + shapes.num_steps * num_microbatches  # the prompt, then one dispatch
    idle = 2 * (num_stages - 1)
    assert ticks == {(s, is_live): n for s in range(num_stages) for is_live, n in ((True, live), (False, idle))}


def test_orbax_weights_are_read_onto_stages(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    convert(Source.open(model_dir), tmp_path / "orbax", lambda done, total: None)
    definition, expected = driver.load(model_dir, "stage:4,tensor:2")
    arrays = orbax_weights.load(tmp_path / "orbax", definition)
    for spec, array, wanted in zip(definition.params, arrays, expected, strict=True):
        assert array.sharding == wanted.sharding == spec.sharding
        np.testing.assert_array_equal(array, wanted, spec.path)


def test_weights_on_stages_are_written_again(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    write_model(tmp_path / "again", CONFIG, *driver.load(model_dir, "stage:4,tensor:2"))
    before, after = (load_file(directory / "model.safetensors") for directory in (model_dir, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        np.testing.assert_array_equal(tensor, after[name], name)


def test_every_layer_is_on_its_stage_alone(model_dir: pathlib.Path):
    """A slot's array is put together of the parts that lie on the devices already, and zeros."""
    definition, arrays = driver.load(model_dir, "stage:4")
    arrays = tuple(map(jax.jit(jnp.copy), arrays))  # for what was loaded may lie in NumPy's memory, and cannot be given
    by_path = {spec.path: np.array(array) for spec, array in zip(definition.params, arrays, strict=True)}  # copies
    places = {shard.data.unsafe_buffer_pointer() for array in arrays for shard in array.addressable_shards}
    stacked = dict(zip((weight.path for weight in definition.weights), definition.stack(arrays), strict=True))
    up = np.asarray(stacked["layers/2/mlp/up/weight"])
    assert not up[:3].any()  # the first three stages have two layers, and padding
    np.testing.assert_array_equal(up[3], by_path["layers/8/mlp/up/weight"])
    assert stacked["layers/2/mlp/up/weight"].addressable_shards[0].data.shape == (1, *up.shape[1:])
    down = stacked["layers/0/mlp/down/weight"]  # of which no stage has padding
    assert {shard.data.unsafe_buffer_pointer() for shard in down.addressable_shards} <= places, "it was copied"
