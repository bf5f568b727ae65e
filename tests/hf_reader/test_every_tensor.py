"""Of every family: each kind of tensor, missing, of another shape or there twice, and one too many, is named."""

import pathlib
import re

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer import models
from jaxinfer.checkpoint import hf_reader
from jaxinfer.checkpoint.hf_index import SINGLE_FILE
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from tests.hf_reader.directory import SHARD, Tensors, write_index
from tests.parity import recipe


@pytest.fixture(params=models.families())
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def tensors(family: str) -> Tensors:
    return recipe.weights(family, recipe.first_config(family))


@pytest.fixture
def definition(family: str) -> ModelDefinition:
    config = models.get(family).parse_config(HFConfig(recipe.first_config(family)))
    return ModelDefinition.create(config, Partitioner.create(), jnp.dtype("float32"))


def refusal(model_dir: pathlib.Path, definition: ModelDefinition) -> str:
    """What is said before anything is read; empty if nothing is."""
    try:
        hf_reader.check_matches(hf_reader.open_index(model_dir, definition), definition)
    except ValueError as error:
        return str(error)
    return ""


def of_one_file(model_dir: pathlib.Path, tensors: Tensors, definition: ModelDefinition) -> str:
    save_file(tensors, model_dir / SINGLE_FILE)
    return refusal(model_dir, definition)


def test_each_is_named(family: str, tensors: Tensors, definition: ModelDefinition, tmp_path: pathlib.Path):
    model_dir = recipe.write_model(tmp_path / "model", recipe.first_config(family), tensors)
    assert refusal(model_dir, definition) == ""
    kind = lambda name: re.sub(r"(?<=\.)\d+(?=\.)", "N", name)  # noqa: E731 (whatever layer or expert)
    of_kind = {kind(name): (name, tensor) for name, tensor in tensors.items()}
    for name, tensor in of_kind.values():
        others = {other: tensors[other] for other in tensors if other != name}
        told = of_one_file(model_dir, others, definition)
        assert f"missing 1 ({name})" in told
        told = of_one_file(model_dir, others | {name: np.concatenate([tensor, tensor])}, definition)
        assert f"{name} in {SINGLE_FILE} has shape" in told and f"expected {tensor.shape}" in told
        told = of_one_file(model_dir, tensors | {f"{name}.1": tensor}, definition)
        assert f"left over 1 ({name}.1)" in told
    (model_dir / SINGLE_FILE).unlink()
    save_file(tensors, model_dir / SHARD.format(0))
    write_index(model_dir, dict.fromkeys(tensors, SHARD.format(0)) | {"other": SHARD.format(1)})
    for name, tensor in of_kind.values():
        save_file({"other": tensor, name: tensor}, model_dir / SHARD.format(1))
        told = refusal(model_dir, definition)
        assert name in told and f"are in both {SHARD.format(0)} and {SHARD.format(1)}" in told
    print(f"{len(of_kind)} kinds of tensors: each named where it is missing, misshapen, one too many or there twice")
