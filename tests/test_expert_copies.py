"""Weights of experts that are in several slots: loaded as copies, by the devices that have them, and saved once."""

import dataclasses
import pathlib

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer import models
from jaxinfer.checkpoint import conversion, hf_writer, reader
from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.steps import Arrays
from tests.parity import driver, recipe

SLOTS = (3, 1, 4, 1, 5, 2, 6, 0, 7, 4, 4, 1)  # three for each of four devices; neighbours in the file and others


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])  # a tensor for each expert, and one for all
def model_dir(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    family = request.param
    config = recipe.first_config(family)
    return recipe.write_model(tmp_path_factory.mktemp(family) / "model", config, recipe.weights(family, config))


def define(model_dir: pathlib.Path, slots: tuple[int, ...] = SLOTS) -> ModelDefinition:
    return with_slots(driver.read_config(model_dir), slots)


def with_slots(config: ModelConfig, slots: tuple[int, ...]) -> ModelDefinition:
    assert config.moe is not None
    moe = dataclasses.replace(config.moe, placements=(slots,) * config.num_layers)
    return ModelDefinition.create(
        dataclasses.replace(config, moe=moe), Partitioner.create("expert:4"), jnp.dtype("float32")
    )


def check_copies(found: Arrays, model_dir: pathlib.Path, definition: ModelDefinition) -> None:
    _, whole = driver.load(model_dir)
    for spec, array, once in zip(definition.params, found, whole, strict=True):
        wanted = np.asarray(once)[list(SLOTS)] if "experts/" in spec.path else np.asarray(once)
        assert array.sharding == spec.sharding
        np.testing.assert_array_equal(array, wanted, err_msg=spec.path)


def test_each_slot_gets_its_expert(model_dir: pathlib.Path):
    definition = define(model_dir)
    check_copies(reader.load_weights(model_dir, definition), model_dir, definition)


def test_each_slot_gets_its_expert_from_orbax(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    conversion.convert(conversion.Source.open(model_dir), tmp_path / "orbax", lambda done, total: None)
    definition = define(model_dir)
    check_copies(reader.load_weights(tmp_path / "orbax", definition), model_dir, definition)


def test_random_weights_are_those_of_one_device_with_copies():
    config = models.get("mixtral").parse_config(HFConfig(recipe.first_config("mixtral") | {"num_hidden_layers": 1}))
    once = ModelDefinition.create(config, Partitioner.create(), jnp.dtype("float32")).init(3)
    definition = with_slots(config, SLOTS)
    for spec, array, whole in zip(definition.params, definition.init(3), once, strict=True):
        wanted = np.asarray(whole)[list(SLOTS)] if "experts/" in spec.path else np.asarray(whole)
        np.testing.assert_array_equal(array, wanted, err_msg=spec.path)


def test_saving_drops_the_copies(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    definition = define(model_dir)
    arrays = reader.load_weights(model_dir, definition)
    hf_writer.write_model(tmp_path / "saved", {}, definition, arrays)
    saved, original = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", model_dir))
    assert saved.keys() == original.keys()
    for name, tensor in original.items():
        np.testing.assert_array_equal(saved[name], tensor, err_msg=name)


def test_a_permutation_of_the_experts_is_no_identity(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    """Of the same shape as without, so nothing else would tell."""
    definition = define(model_dir, tuple(reversed(range(8))))
    once = dict(zip((spec.path for spec in definition.params), driver.load(model_dir)[1], strict=True))
    conversion.convert(conversion.Source.open(model_dir), tmp_path / "orbax", lambda done, total: None)
    for directory in (tmp_path / "orbax", model_dir):
        arrays = reader.load_weights(directory, definition)
        for spec, array in zip(definition.params, arrays, strict=True):
            if "experts/" in spec.path:
                np.testing.assert_array_equal(array, np.asarray(once[spec.path])[::-1])
    hf_writer.write_model(tmp_path / "saved", {}, definition, arrays)
    saved, original = (load_file(path / "model.safetensors") for path in (tmp_path / "saved", model_dir))
    assert all(np.array_equal(saved[name], tensor) for name, tensor in original.items())
