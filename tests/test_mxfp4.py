"""Weights packed in MXFP4 are those of the bfloat16 model that they stand for, on every mesh and in every format."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoint import conversion, mxfp4
from jaxinfer.checkpoint.hf_index import INDEX_FILE, SINGLE_FILE, TensorIndex
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import get
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from tests.parity import driver, golden, recipe, reference
from tests.test_families import generate

CONFIG = recipe.tiny_config("gpt_oss", "gqa")
QUANTIZED = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
GATE_UP, DOWN = (f"model.layers.1.mlp.experts.{name}_proj" for name in ("gate_up", "down"))
NUMBERS = [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]

Tensors = dict[str, np.ndarray]


def unpacked(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float64 [experts, inputs, outputs], number by number."""
    experts, outputs, num_blocks, _ = blocks.shape
    whole = np.zeros((experts, num_blocks * 32, outputs))
    for e, i, o in np.ndindex(whole.shape):
        byte, scale = int(blocks[e, o, i // 32, i % 32 // 2]), float(scales[e, o, i // 32])
        whole[e, i, o] = NUMBERS[byte // 16 if i % 2 else byte % 16] * 2.0 ** (scale - 127)
    return whole


def pack(tensors: Tensors) -> tuple[Tensors, Tensors]:
    """A model with random packed experts in place of its own, and the bfloat16 one that it stands for."""
    packed, plain, rng = dict(tensors), dict(tensors), np.random.default_rng(0)
    for name in [name for name in tensors if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = packed.pop(name).shape
        blocks = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        scales = rng.integers(121, 125, blocks.shape[:-1], np.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = unpacked(blocks, scales).astype(jnp.bfloat16)
    return packed, plain


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """Directories of the packed model and of its twin."""
    packed, plain = pack(recipe.weights("gpt_oss", CONFIG))
    parent = tmp_path_factory.mktemp("models")
    return recipe.write_model(parent / "packed", CONFIG | QUANTIZED, packed), recipe.write_model(
        parent / "plain", CONFIG, plain
    )


def change(models: tuple[pathlib.Path, pathlib.Path], directory: pathlib.Path, **tensors: Any) -> pathlib.Path:
    """The packed model with other tensors in its second layer's last projection; without those that are None."""
    changed = load_file(models[0] / SINGLE_FILE) | {f"{DOWN}{end}": tensor for end, tensor in tensors.items()}
    kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
    return recipe.write_model(directory, CONFIG | QUANTIZED, kept)


def test_every_number_at_every_scale():
    scales = np.arange(255, dtype=np.uint8).reshape(1, 255, 1)
    blocks = np.tile(np.arange(16, dtype=np.uint8) * 17, (1, 255, 1, 1))  # each number twice
    with np.errstate(over="ignore"):
        expected = unpacked(blocks, scales).astype(jnp.bfloat16).swapaxes(1, 2)
    assert np.isinf(expected[0, 254]).sum() == 4 * 4 and np.isfinite(expected[0, :253]).all()
    found = mxfp4.dequantize(blocks, scales)
    assert found.dtype == jnp.bfloat16 and found.tobytes() == np.ascontiguousarray(expected).tobytes()
    assert np.isnan(mxfp4.dequantize(blocks, np.full_like(scales, 255)).astype(np.float32)).all()


def test_the_low_nibble_comes_first():
    blocks = np.full((1, 1, 1, 16), 0xB2, np.uint8)
    np.testing.assert_array_equal(mxfp4.dequantize(blocks, np.full((1, 1, 1), 128, np.uint8))[0, 0], [2.0, -3.0] * 16)


@pytest.mark.parametrize("inputs", [slice(0, 96), slice(24, 48), slice(64, 96), slice(31, 33), slice(5, 6)])
def test_slices_are_cut_out_of_whole_blocks(inputs: slice):
    rng = np.random.default_rng(0)
    blocks, scales = rng.integers(0, 256, (3, 8, 3, 16), np.uint8), rng.integers(120, 130, (3, 8, 3), np.uint8)
    touched = np.zeros(scales.shape, bool)

    def read_scales(slices: mxfp4.Slices) -> np.ndarray:
        touched[slices] = True
        return scales[slices]

    where = (slice(1, 3), inputs, slice(2, 7))
    found = mxfp4.read(blocks.__getitem__, read_scales, where)
    np.testing.assert_array_equal(found.astype(np.float64), unpacked(blocks, scales)[where])
    expected = np.zeros_like(touched)
    expected[1:3, 2:7, inputs.start // 32 : (inputs.stop - 1) // 32 + 1] = True
    np.testing.assert_array_equal(touched, expected)


@pytest.mark.parametrize("mesh", ["", "tensor:2", "tensor:4", "data:2,tensor:4"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_loads_the_same_arrays_as_its_twin(models: tuple[pathlib.Path, pathlib.Path], mesh: str, dtype: str):
    """96 hidden units: a mesh of 2 or 4 cuts blocks of the last projection."""
    config = driver.read_config(models[0])
    assert config == driver.read_config(models[1])
    definition = ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype(dtype))
    found, expected = (load_weights(model_dir, definition) for model_dir in models)
    for spec, array, wanted in zip(definition.params, found, expected, strict=True):
        assert (array.dtype, array.sharding) == (wanted.dtype, wanted.sharding)
        np.testing.assert_array_equal(array, wanted, spec.path)


def test_generates_the_same_tokens_as_its_twin(models: tuple[pathlib.Path, pathlib.Path]):
    packed, plain = models
    assert generate(packed, "tensor:4") == generate(plain, "")


def test_blocks_and_scales_may_lie_in_different_files(
    models: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path
):
    tensors = load_file(models[0] / SINGLE_FILE)
    is_scale = {name: name.endswith("_scales") for name in tensors}
    for number in (0, 1):
        save_file({k: v for k, v in tensors.items() if is_scale[k] == number}, tmp_path / f"{number}.safetensors")
    (tmp_path / INDEX_FILE).write_text(
        json.dumps({"weight_map": {name: f"{number:d}.safetensors" for name, number in is_scale.items()}})
    )
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | QUANTIZED))
    definition = driver.load_definition(tmp_path)
    for found, expected in zip(load_weights(tmp_path, definition), load_weights(models[1], definition), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_becomes_bfloat16_in_orbax_and_back(models: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path):
    nothing = lambda done, total: None  # noqa: E731
    for source, target in ((models[0], tmp_path / "orbax"), (tmp_path / "orbax", tmp_path / "back")):
        conversion.convert(conversion.Source.open(source), target, nothing)
        assert json.loads((target / "config.json").read_text()) == CONFIG
    back, plain = (load_file(directory / SINGLE_FILE) for directory in (tmp_path / "back", models[1]))
    assert back.keys() == plain.keys()
    for name, tensor in plain.items():
        assert back[name].dtype == tensor.dtype and back[name].tobytes() == tensor.tobytes(), name


@pytest.mark.parity
def test_what_comes_back_loads_in_transformers(models: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path):
    nothing = lambda done, total: None  # noqa: E731
    conversion.convert(conversion.Source.open(models[0]), tmp_path / "orbax", nothing)
    conversion.convert(conversion.Source.open(tmp_path / "orbax"), tmp_path / "back", nothing)
    prompt = recipe.prompt(40, CONFIG["vocab_size"], 0)
    with driver.greedy_only():
        (ours,) = driver.continue_prompts(models[0], [prompt], 4)
    theirs = reference.logits(reference.load(tmp_path / "back"), prompt + ours.tokens[:-1])
    assert golden.relative_error(ours.logits, theirs) < golden.MAX_ERROR


@pytest.mark.parity
def test_unpacks_as_transformers_does(models: tuple[pathlib.Path, pathlib.Path]):
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    rng = np.random.default_rng(1)
    blocks, scales = rng.integers(0, 256, (2, 6, 3, 16), np.uint8), rng.integers(1, 252, (2, 6, 3), np.uint8)
    theirs = convert_moe_packed_tensors(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.bfloat16)
    whole = (slice(0, 2), slice(0, 96), slice(0, 6))
    ours = mxfp4.read(blocks.__getitem__, scales.__getitem__, whole)
    np.testing.assert_array_equal(ours.astype(np.float32), theirs.float().numpy())


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"_scales": None}, f"{DOWN} is packed in MXFP4, and {DOWN}_scales is missing"),
        ({"_blocks": None}, f"{DOWN} is packed in MXFP4, and {DOWN}_blocks is missing"),
        ({"": np.zeros((8, 96, 64), np.float32)}, f"{DOWN} is there twice: as it is, and packed in MXFP4"),
        ({"_scales": np.zeros((8, 64, 2), np.uint8)}, f"{DOWN}_scales \\(8, 64, 2\\); expected"),
        ({"_blocks": np.zeros((8, 64, 3, 8), np.uint8)}, f"{DOWN}_blocks has shape \\(8, 64, 3, 8\\) and"),
        ({"_scales": np.zeros((8, 64, 3), np.int8)}, f"{DOWN}_scales is I8; expected U8"),
        (
            {"_blocks": np.zeros((8, 64, 2, 16), np.uint8), "_scales": np.zeros((8, 64, 2), np.uint8)},
            f"{DOWN} in {SINGLE_FILE} has shape \\(8, 64, 64\\), expected \\(8, 96, 64\\)",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(
    models: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, tensors: dict[str, Any], message: str
):
    directory = change(models, tmp_path / "model", **tensors)
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(directory, driver.load_definition(directory))
    assert str(caught.value).startswith(str(directory)) and "\n" not in str(caught.value)


def test_config_and_weights_must_agree(models: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path):
    packed, plain = (load_file(directory / SINGLE_FILE) for directory in models)
    claims = recipe.write_model(tmp_path / "claims", CONFIG | QUANTIZED, plain)
    with pytest.raises(ValueError, match=r"quantization_config in config\.json says mxfp4, and no tensor's name ends"):
        TensorIndex.open(claims)
    hides = recipe.write_model(tmp_path / "hides", CONFIG, packed)
    with pytest.raises(ValueError, match=r"missing 4 \(.*down_proj, .*left over 8 \(.*down_proj_blocks, "):
        load_weights(hides, driver.load_definition(hides))


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, " has quant_method 'gptq', which is not implemented; implemented: mxfp4"),
        ({"bits": 4}, " has quant_method None, which is not implemented"),
        (QUANTIZED["quantization_config"] | {"bits": 3}, r": mxfp4 does not know \['bits'\]"),
        ("mxfp4", " is 'mxfp4'; expected an object"),
    ],
)
@pytest.mark.parametrize("family", ["gpt_oss", "llama"])
def test_other_ways_to_pack_are_refused_by_name(family: str, quantization: Any, message: str):
    values = recipe.tiny_config(family, "gqa") | {"quantization_config": quantization}
    with pytest.raises(ValueError, match=f"m/config.json: quantization_config{message}"):
        get(family).parse_config(HFConfig(values, "m/config.json"))
