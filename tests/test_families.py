"""What every decoder does beside agreeing with transformers: the same on every mesh, in pieces, and in files again."""

import pathlib
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer import models
from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.tools import parallel_matrix
from tests.long_campaign import IS_LONG, chosen
from tests.parity import driver, recipe

ROOT = pathlib.Path(__file__).parents[1]
EVERY_AXIS = "data:2,context:2,tensor:2"
MESHES = chosen(("tensor:2", "tensor:4", "data:2,tensor:2", "context:8", "context:2,tensor:2", EVERY_AXIS), EVERY_AXIS)
PUBLISHED = {key.split()[0] for key in parallel_matrix.read_record(ROOT / "docs" / "parallel_matrix.json")}
NEW = [family for family in models.decoders() if family not in PUBLISHED]
# A plain run leaves out what the published matrix says of a family, where one of these stands for it: plain attention,
# windows, sinks and experts, values in keys.
on_meshes = pytest.mark.parametrize("family", chosen(models.decoders(), "llama", "gemma3", "gpt_oss", "deepseek", *NEW))
# And where tests/parity has its logits in pieces and token by token.
in_pieces = pytest.mark.parametrize("family", chosen(models.decoders(), "gpt_oss", "deepseek", *NEW))
SHAPES = driver.Shapes(rows=2, max_len=160, chunk=64, num_steps=1 if IS_LONG else 0)
PROMPT_LENGTHS = (5, 130, 33)  # the second goes beyond the tiny models' windows
NUM_TOKENS = 12


@pytest.fixture(params=models.decoders())
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def config(family: str) -> dict[str, Any]:
    return recipe.first_config(family)


@pytest.fixture
def model_dir(family: str, config: dict[str, Any], tmp_path: pathlib.Path) -> pathlib.Path:
    return recipe.write_model(tmp_path / "model", config, recipe.weights(family, config))


def generate(model_dir: pathlib.Path, mesh: str) -> list[list[int]]:
    return driver.generate_on(model_dir, mesh, SHAPES, PROMPT_LENGTHS, NUM_TOKENS)


@on_meshes
def test_same_tokens_on_every_mesh(model_dir: pathlib.Path):
    expected = generate(model_dir, "")
    for mesh in MESHES:
        assert generate(model_dir, mesh) == expected, mesh


@in_pieces
def test_prefill_equals_decoding_token_by_token(model_dir: pathlib.Path):
    prompts = [recipe.prompt(130, 128, 0)]
    with driver.greedy_only():
        (whole,), (single,) = (driver.continue_prompts(model_dir, prompts, 8, chunk, num_steps=0) for chunk in (130, 1))
    assert single.tokens == whole.tokens
    assert np.abs(single.logits - whole.logits).max() < 1e-5 * np.abs(whole.logits).max()


def test_weights_come_back_byte_for_byte(model_dir: pathlib.Path, config: dict[str, Any], tmp_path: pathlib.Path):
    """Read onto a mesh that splits and repeats heads, and written again."""
    write_model(tmp_path / "again", config, *driver.load(model_dir, "tensor:4"))
    before, after = (load_file(directory / "model.safetensors") for directory in (model_dir, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
