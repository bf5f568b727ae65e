"""Weights arrive whole, once, in the right place; a directory that is broken or of another model is refused first."""

import contextlib
import functools
import json
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoint.hf_index import INDEX_FILE, SINGLE_FILE, ReadSlices, TensorIndex
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.checkpoint.layout import Slices
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

Tensors = dict[str, np.ndarray]
EMBED, Q = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
SHARD = "model-{}-of-2.safetensors"


@functools.cache
def define(name: str = "gqa", mesh: str = "", dtype: Any = jnp.float32) -> ModelDefinition:
    config = llama.parse_config(HFConfig(llama.TINY_CONFIGS[name]))
    return ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype(dtype))


def write(directory: pathlib.Path, name: str = "gqa", dtype: Any = jnp.float32) -> tuple[pathlib.Path, Tensors]:
    """A random model's directory and its parameters by path. NumPy's numbers: `init` would be compiled first."""
    definition, rng = define(name, dtype=dtype), np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.standard_normal(spec.shape, np.float32), dtype) for spec in definition.params)
    write_model(directory, llama.TINY_CONFIGS[name], definition, arrays)
    return directory, {spec.path: np.asarray(a) for spec, a in zip(definition.params, arrays, strict=True)}


@pytest.fixture
def model(tmp_path: pathlib.Path) -> pathlib.Path:
    return write(tmp_path / "model")[0]


def change(directory: pathlib.Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, directory / SINGLE_FILE)


def split(directory: pathlib.Path) -> tuple[Tensors, Tensors]:
    """Turns the single file into two shards and an index; returns the tensors of each."""
    tensors = load_file(directory / SINGLE_FILE)
    names = sorted(tensors)
    parts = [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]
    for i, part in enumerate(parts):
        save_file(part, directory / SHARD.format(i))
    write_index(directory, {name: SHARD.format(i) for i, part in enumerate(parts) for name in part})
    (directory / SINGLE_FILE).unlink()
    return parts[0], parts[1]


def write_index(directory: pathlib.Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_index(directory: pathlib.Path, **weight_map: object) -> None:
    old = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    write_index(directory, {name: file for name, file in (old | weight_map).items() if file is not None})


def assert_refused(directory: pathlib.Path, message: str, name: str = "gqa") -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(directory, define(name))
    assert "\n" not in str(caught.value)


# What arrives.


@pytest.mark.parametrize("name", ["gqa", "tied", "biases", "head_dim_80"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_round_trip_is_bit_equal(tmp_path: pathlib.Path, name: str, dtype: Any):
    directory, expected = write(tmp_path / "model", name, dtype)
    definition = define(name, dtype=dtype)
    for spec, array in zip(definition.params, load_weights(directory, definition), strict=True):
        assert (array.shape, array.dtype, array.sharding) == (spec.shape, spec.dtype, spec.sharding)
        assert np.asarray(array).tobytes() == expected[spec.path].tobytes(), spec.path


def test_a_model_made_on_a_mesh_comes_back_from_its_directory(tmp_path: pathlib.Path):
    definition = define(mesh="tensor:2")
    arrays = definition.init()
    write_model(tmp_path / "model", llama.TINY_CONFIGS["gqa"], definition, arrays)
    for array, wanted in zip(load_weights(tmp_path / "model", definition), arrays, strict=True):
        assert array.sharding == wanted.sharding
        np.testing.assert_array_equal(array, wanted)


@pytest.mark.parametrize(
    ("name", "mesh", "repeats"),
    [
        ("gqa", "tensor:2", 1),
        ("gqa", "tensor:8", 4),
        ("mqa", "tensor:8", 8),
        ("biases", "tensor:8", 4),
        ("gqa", "data:2,tensor:4", 2),
        ("gqa", "data:8", 1),
    ],
)
def test_a_mesh_holds_the_same_weights_with_kv_heads_repeated_in_groups(
    tmp_path: pathlib.Path, name: str, mesh: str, repeats: int
):
    directory, expected = write(tmp_path / "model", name)
    definition = define(name, mesh)
    for spec, array in zip(definition.params, load_weights(directory, definition), strict=True):
        whole = expected[spec.path]
        if "kv_heads" in spec.axes:
            whole = np.repeat(whole, repeats, axis=0)
        assert array.sharding == spec.sharding
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[shard.index], spec.path)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_weights_are_cast(model: pathlib.Path, dtype: Any):
    definition = define(dtype=dtype)
    exact = load_weights(model, define())
    for array, wanted in zip(load_weights(model, definition), exact, strict=True):
        np.testing.assert_array_equal(np.asarray(array), np.asarray(wanted).astype(dtype))


@pytest.mark.parametrize("stored", [jnp.float32, jnp.bfloat16])
def test_a_cast_does_not_make_infinities(tmp_path: pathlib.Path, stored: Any):
    directory, _ = write(tmp_path / "model", dtype=stored)
    change(directory, lambda tensors: np.copyto(tensors[Q], tensors[Q].dtype.type(1e5)))
    load_weights(directory, define(dtype=jnp.bfloat16))
    with pytest.raises(ValueError, match=f"{Q}: holds values beyond float16's 65504; use --dtype=bfloat16"):
        load_weights(directory, define(dtype=jnp.float16))


def test_shards_and_index(model: pathlib.Path):
    exact = load_weights(model, define())
    split(model)
    for array, wanted in zip(load_weights(model, define()), exact, strict=True):
        np.testing.assert_array_equal(array, wanted)


def test_progress_ends_at_the_weights_bytes(model: pathlib.Path):
    definition, calls = define(mesh="tensor:2"), []
    load_weights(model, definition, lambda done, total: calls.append((done, total)))
    assert len(calls) == len(definition.params) and calls == sorted(calls)
    assert calls[-1] == (definition.weight_bytes, definition.weight_bytes)


# How much is read.


@pytest.mark.parametrize("mesh", ["", "tensor:2", "tensor:8", "data:2,tensor:4", "data:8"])
def test_every_byte_is_read_once_and_in_slices(model: pathlib.Path, mesh: str, monkeypatch: pytest.MonkeyPatch):
    """However many devices hold a slice, the file's bytes are read once, and no read is larger than a shard."""
    reads: dict[str, list[Slices]] = {}
    original = TensorIndex.reader

    @contextlib.contextmanager
    def counting(index: TensorIndex, name: str) -> Iterator[ReadSlices]:
        with original(index, name) as read:

            def counted(slices: Slices) -> np.ndarray:
                reads.setdefault(name, []).append(slices)
                return read(slices)

            yield counted

    monkeypatch.setattr(TensorIndex, "reader", counting)
    definition = define(mesh=mesh)
    load_weights(model, definition)
    stored = TensorIndex.open(model).tensors
    assert reads.keys() == stored.keys()
    names = llama.weight_names(definition.config)
    for spec in definition.params:
        slices = reads[names[spec.path]]
        times_read = np.zeros(stored[names[spec.path]].shape, np.int32)
        for where in slices:
            times_read[where] += 1
            # A KV head that several devices share is as large as one device's shard of the repeated heads.
            assert times_read[where].size <= np.prod(spec.sharding.shard_shape(spec.shape))
        assert (times_read == 1).all(), spec.path


def test_nothing_is_sent_before_all_is_checked(model: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    change(model, lambda tensors: tensors.pop(Q))
    definition = define()
    monkeypatch.setattr(jax, "device_put", lambda *args: pytest.fail("sent to a device"))
    with pytest.raises(ValueError, match="missing 1"):
        load_weights(model, definition)


# Tensors that do not fit the model.


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


# Directories that are not whole.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "consolidated.00.pth"])
def test_other_formats_are_named_and_not_read(tmp_path: pathlib.Path, name: str):
    (tmp_path / name).write_bytes(b"x")
    assert_refused(tmp_path, rf"only safetensors is read, not 1 \({name}\)")


def test_shards_without_their_index_are_refused(model: pathlib.Path):
    split(model)
    (model / INDEX_FILE).unlink()
    assert_refused(model, r"without the index the files 2 \(model-0-of-2.safetensors, model-1")


def test_an_empty_directory_is_refused(tmp_path: pathlib.Path):
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


# Directories that are not to be trusted.


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/out.safetensors", "a/out.safetensors", "a\0.safetensors", "a\\b.safetensors", 3]
)
def test_a_file_name_that_is_a_path_is_refused(model: pathlib.Path, name: object):
    first, _ = split(model)
    save_file(first, model.parent / "out.safetensors")
    change_index(model, **{Q: name})
    assert_refused(model, "expected the plain name of a .safetensors file")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "..", ""])
def test_a_file_name_of_another_format_is_refused(model: pathlib.Path, name: str):
    split(model)
    change_index(model, **{Q: name})
    assert_refused(model, "expected the plain name of a .safetensors file")


@pytest.mark.parametrize("sharded", [False, True])
def test_a_link_out_of_the_directory_is_refused(model: pathlib.Path, sharded: bool):
    if sharded:
        split(model)
    path = model / (SHARD.format(0) if sharded else SINGLE_FILE)
    outside = model.parent / "outside.safetensors"
    os.rename(path, outside)
    path.symlink_to(outside)
    assert_refused(model, f"{path} is a link that leads out of the directory")


def test_a_link_to_nowhere_or_itself_is_refused(model: pathlib.Path):
    path = model / SINGLE_FILE
    path.unlink()
    path.symlink_to(model / "nothing.safetensors")
    assert_refused(model, "model.safetensors is missing")
    path.unlink()
    path.symlink_to(path)
    assert_refused(model, "model.safetensors")


def test_a_pipe_is_refused(model: pathlib.Path):
    """Opening one waits for ever."""
    (model / SINGLE_FILE).unlink()
    os.mkfifo(model / SINGLE_FILE)
    assert_refused(model, "is not a regular file")


def test_the_download_caches_links_are_followed(model: pathlib.Path, tmp_path: pathlib.Path):
    """Hugging Face's cache links snapshots/<commit>/model.safetensors to blobs/<sha256> two directories up."""
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    os.rename(model / SINGLE_FILE, blobs / "123")
    (snapshot / SINGLE_FILE).symlink_to("../../blobs/123")
    load_weights(snapshot, define())
    os.rename(blobs / "123", tmp_path / "hub" / "123")
    (snapshot / SINGLE_FILE).unlink()
    (snapshot / SINGLE_FILE).symlink_to("../../123")
    assert_refused(snapshot, "is a link that leads out of the directory")
