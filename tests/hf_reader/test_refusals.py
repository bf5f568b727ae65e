"""Weights of another model, and directories that are not whole, are refused in a line that names them."""

import pathlib

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint.hf_index import INDEX_FILE, SINGLE_FILE
from jaxinfer.checkpoint.hf_reader import load_weights
from tests.hf_reader.directory import EMBED, SHARD, Q, assert_refused, change, change_index, define, split, write


def test_missing_and_left_over_tensors_are_named(model: pathlib.Path):
    change(model, lambda tensors: tensors.update({"extra.weight": tensors.pop(Q)}))
    assert_refused(model, rf"missing 1 \({Q}\); left over 1 \(extra.weight\)")


def test_only_five_are_named(model: pathlib.Path):
    change(model, lambda tensors: tensors.update({f"extra.{i}": tensors[Q].copy() for i in range(7)}))
    assert_refused(model, r"left over 7 \(extra.0, extra.1, extra.2, extra.3, extra.4, \.\.\.\)")


def test_a_wrong_shape_is_named_with_both_shapes(model: pathlib.Path):
    change(model, lambda tensors: tensors.update({Q: tensors[Q].T.copy()}))
    assert_refused(model, rf"{Q} in model.safetensors has shape \(64, 128\), expected \(128, 64\)")


@pytest.mark.parametrize("dtype", ["int8", "int64", "bool"])
def test_a_dtype_that_is_no_float_is_refused(model: pathlib.Path, dtype: str):
    change(model, lambda tensors: tensors.update({Q: np.zeros(tensors[Q].shape, dtype)}))
    assert_refused(model, f"{Q} in model.safetensors is .*, readable are BF16 F16 F32 F64")


def test_the_rotary_constant_of_old_checkpoints_is_ignored(model: pathlib.Path):
    constant = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(8, np.float32)}
    change(model, lambda tensors: tensors.update(constant))
    load_weights(model, define())


def test_a_copy_of_the_tied_head_is_ignored_but_another_head_is_not(tmp_path: pathlib.Path):
    model, _ = write(tmp_path / "model", "tied")
    change(model, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBED].copy()}))
    load_weights(model, define("tied"))
    change(model, lambda tensors: tensors["lm_head.weight"].__setitem__((100, 3), 0.5))
    assert_refused(model, "ties lm_head.weight to model.embed_tokens.weight, but the two differ", "tied")
    change(model, lambda tensors: tensors.update({"lm_head.weight": np.ones((3, 3), np.float32)}))
    assert_refused(model, r"lm_head.weight in model.safetensors has shape \(3, 3\), expected \(128, 64\)", "tied")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_other_formats_are_named_and_not_read(tmp_path: pathlib.Path, name: str):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"x")
    assert_refused(tmp_path, rf"only safetensors is read, not 1 \({name}\)")


def test_shards_without_their_index_are_refused(model: pathlib.Path):
    split(model)
    (model / INDEX_FILE).unlink()
    assert_refused(model, r"without the index the files 2 \(model-0-of-2.safetensors, model-1")


def test_a_directory_without_weights_is_refused(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text("{}")
    assert_refused(tmp_path, "neither model.safetensors nor model.safetensors.index.json is there$")


def test_a_missing_shard_is_named(model: pathlib.Path):
    split(model)
    (model / SHARD.format(1)).unlink()
    assert_refused(model, f"{SHARD.format(1)} is missing")


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "length", "header", "data"])
def test_a_truncated_file_is_named(model: pathlib.Path, keep: int):
    path = model / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(model, f"{path}: corrupt, truncated or unreadable")


def test_a_header_that_is_no_header_is_named(model: pathlib.Path):
    (model / SINGLE_FILE).write_bytes(b"\xff" * 64)
    assert_refused(model, "model.safetensors: corrupt, truncated or unreadable")


def test_a_tensor_in_two_shards_is_refused(model: pathlib.Path):
    first, second = split(model)
    save_file(second | {Q: np.zeros(2, np.float32)} | first, model / SHARD.format(1))
    assert_refused(model, "are in both model-0-of-2.safetensors and model-1-of-2.safetensors")


def test_a_listed_tensor_that_is_in_no_file_is_refused(model: pathlib.Path):
    split(model)
    change_index(model, ghost=SHARD.format(0))
    assert_refused(model, r"listed there but in no file: 1 \(ghost\)")


def test_a_tensor_that_is_not_listed_is_refused(model: pathlib.Path):
    split(model)
    change_index(model, **{Q: None})
    assert_refused(model, rf"in the files but not listed there: 1 \({Q}\)")


def test_a_tensor_in_another_file_than_listed_is_refused(model: pathlib.Path):
    first, _ = split(model)
    name = min(first)
    change_index(model, **{name: SHARD.format(1)})
    assert_refused(model, rf"in another file than the one listed: 1 \({name}\)")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not a readable JSON index"),
        ("[]", "weight_map is None"),
        ('{"weight_map": {}}', "weight_map is {}"),
        ('{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}', r"given twice: 1 \(a\)"),
    ],
)
def test_a_broken_index_is_refused(model: pathlib.Path, text: str, message: str):
    split(model)
    (model / INDEX_FILE).write_text(text)
    assert_refused(model, message)
