"""Weights arrive whole, once, in the right place and dtype, read slice by slice."""

import contextlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.checkpoint.hf_index import ReadTensor, TensorIndex
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.checkpoint.layout import Slices
from jaxinfer.models import llama
from tests.hf_reader.directory import (
    Q,
    change,
    define,
    split,
    write,
)


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


@pytest.mark.parametrize("mesh", ["", "tensor:2", "tensor:8", "data:2,tensor:4", "data:8"])
def test_every_byte_is_read_once_and_in_slices(model: pathlib.Path, mesh: str, monkeypatch: pytest.MonkeyPatch):
    """However many devices hold a slice, the file's bytes are read once, and no read is larger than a shard."""
    reads: dict[str, list[Slices]] = {}
    original = TensorIndex.reader

    @contextlib.contextmanager
    def counting(index: TensorIndex) -> Iterator[ReadTensor]:
        with original(index) as read:

            def counted(name: str, slices: Slices) -> np.ndarray:
                reads.setdefault(name, []).append(slices)
                return read(name, slices)

            yield counted

    monkeypatch.setattr(TensorIndex, "reader", counting)
    definition = define(mesh=mesh)
    load_weights(model, definition)
    stored = TensorIndex.open(model).tensors
    assert reads.keys() == stored.keys()
    names = llama.weight_names(definition.decoder_config)
    for spec in definition.params:
        slices = reads[names[spec.path].name]
        times_read = np.zeros(stored[names[spec.path].name].shape, np.int32)
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
