"""Tensors under other names than the family's, and such as inference does not need, in files as they were published."""

import pathlib

import numpy as np
import pytest

from jaxinfer.checkpoint import conversion
from tests.parity import driver, recipe

GPT2_MASKS = {
    "h.0.attn.bias": np.tri(1024, dtype=np.float32)[None, None],
    "h.1.attn.masked_bias": np.array(-1e4, np.float32),
}
FURTHER_LAYER = {"model.layers.3.eh_proj.weight": np.ones((64, 128), np.float32)}  # the fourth of three


def write(directory: pathlib.Path, family: str, tensors: dict[str, np.ndarray]) -> pathlib.Path:
    return recipe.write_model(directory, recipe.first_config(family), tensors)


@pytest.mark.parametrize(
    ("family", "prefix", "unused"),
    [("gpt2", "transformer.", GPT2_MASKS), ("opt", "model.", {}), ("deepseek", "", FURTHER_LAYER)],
)
def test_read_as_under_the_familys_names(
    family: str, prefix: str, unused: dict[str, np.ndarray], tmp_path: pathlib.Path
):
    tensors = recipe.weights(family, recipe.first_config(family))
    shortened = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    plain = write(tmp_path / "plain", family, tensors)
    published = write(tmp_path / "published", family, shortened | unused)
    for array, again in zip(driver.load(plain)[1], driver.load(published)[1], strict=True):
        np.testing.assert_array_equal(again, array)
    orbax, back = tmp_path / "orbax", tmp_path / "back"
    for before, after in ((published, orbax), (orbax, back)):
        conversion.convert(conversion.Source.open(before), after, lambda done, total: None)
    assert (back / "model.safetensors").read_bytes()  # under the family's names
    for array, again in zip(driver.load(plain)[1], driver.load(back)[1], strict=True):
        np.testing.assert_array_equal(again, array)


@pytest.mark.parametrize(
    ("family", "name"),
    [("gpt2", "transformer.h.0.attn.c_attn.masked_bias"), ("deepseek", "model.layers.4.eh_proj.weight")],
)
def test_others_are_refused(family: str, name: str, tmp_path: pathlib.Path):
    tensors = recipe.weights(family, recipe.first_config(family)) | {name: np.ones(3, np.float32)}
    with pytest.raises(ValueError, match=rf"missing 0 \(\); left over 1 \({name}\)"):
        driver.load(write(tmp_path / "model", family, tensors))


@pytest.mark.parametrize("name", ["gqa", "v2"])
def test_a_layer_too_many_is_refused(name: str, tmp_path: pathlib.Path):
    """Only the one that guesses a second token is left unread."""
    config = recipe.tiny_config("deepseek", name)
    tensors = recipe.weights("deepseek", config)
    short = recipe.write_model(tmp_path / "model", config | {"num_hidden_layers": 2}, tensors)
    with pytest.raises(ValueError, match=r"missing 0 \(\); left over \d+ \(model.layers.2.input_layernorm.weight"):
        driver.load(short)


def test_names_with_and_without_the_prefix_are_refused(tmp_path: pathlib.Path):
    tensors = recipe.weights("opt", recipe.first_config("opt"))
    name = "model.decoder.embed_tokens.weight"
    tensors[name.removeprefix("model.")] = tensors.pop(name)
    with pytest.raises(ValueError, match=r"missing 1 .* left over 1 \(decoder.embed_tokens.weight\)"):
        driver.load(write(tmp_path / "model", "opt", tensors))
