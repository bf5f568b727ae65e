"""A model directory appears whole or not at all, never in the place of anything else, one tensor at a time."""

import functools
import json
import os
import pathlib
import tracemalloc
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.checkpoint.layout import stored_shape
from jaxinfer.checkpoint.replacement import replaced
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

CONFIG = llama.TINY_CONFIGS["gqa"]
MODEL_FILES = ["config.json", "model.safetensors"]


@functools.cache
def define(mesh: str = "") -> ModelDefinition:
    return ModelDefinition.create(llama.parse_config(HFConfig(CONFIG)), Partitioner.create(mesh), jnp.dtype("float32"))


def random_arrays(mesh: str = "", dtype: str = "float32") -> tuple[jax.Array, ...]:
    """The same weights on every mesh: a KV head that is repeated has equal copies."""
    rng = np.random.default_rng(0)
    arrays = []
    for whole, spec in zip(define().params, define(mesh).params, strict=True):
        values = rng.standard_normal(whole.shape, np.float32)
        if whole.shape != spec.shape:
            values = np.repeat(values, spec.shape[0] // whole.shape[0], axis=0)
        arrays.append(jax.device_put(jnp.asarray(values, dtype), spec.sharding))
    return tuple(arrays)


def write(directory: pathlib.Path, mesh: str = "", dtype: str = "float32") -> None:
    write_model(directory, CONFIG, define(mesh), random_arrays(mesh, dtype))


def fill(directory: pathlib.Path, action: Callable[[pathlib.Path], object]) -> None:
    with replaced(directory) as partial:
        action(partial)


def listing(directory: pathlib.Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("mesh", ["", "tensor:2", "tensor:8"])
def test_safetensors_reads_what_was_written(tmp_path: pathlib.Path, mesh: str, dtype: str):
    """Over tensor:8 each of the two KV heads is held by four devices, and written once."""
    write(tmp_path / "model", mesh, dtype)
    tensors, definition = load_file(tmp_path / "model" / "model.safetensors"), define()
    names = llama.weight_names(definition.decoder_config)
    assert tensors.keys() == {part.name for part in names.values()}
    for spec, array in zip(definition.params, random_arrays(dtype=dtype), strict=True):
        stored = tensors[names[spec.path].name]
        assert stored.dtype == array.dtype
        assert stored.shape == stored_shape(spec.shape, spec.axes, definition.config.num_kv_heads)
        assert stored.tobytes() == np.asarray(array).tobytes(), spec.path


def test_the_first_tensor_is_aligned(tmp_path: pathlib.Path):
    write(tmp_path / "model")
    data = (tmp_path / "model" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"] == {"format": "pt"}


@pytest.mark.parametrize("mesh", ["", "tensor:8"])
def test_host_memory_holds_one_tensor_at_a_time(tmp_path: pathlib.Path, mesh: str):
    """A sharded array keeps the host copy that it is asked for, so that reading all would keep the whole model."""
    values = CONFIG | {"num_hidden_layers": 4, "hidden_size": 512, "intermediate_size": 2048}
    definition = ModelDefinition.create(
        llama.parse_config(HFConfig(values)), Partitioner.create(mesh), jnp.dtype("float32")
    )
    arrays = tuple(jax.device_put(np.zeros(spec.shape, np.float32), spec.sharding) for spec in definition.params)
    largest, model_bytes = max(spec.num_bytes for spec in definition.params), definition.weight_bytes
    tracemalloc.start()
    write_model(tmp_path / "model", values, definition, arrays)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    python_objects = 1 << 20  # descriptions of the arrays' shards
    assert peak < 2 * largest + python_objects < model_bytes / 5
    del arrays  # they lived until here, with all that they kept


def test_an_earlier_model_is_replaced(tmp_path: pathlib.Path):
    directory = tmp_path / "model"
    write(directory, dtype="bfloat16")
    (directory / "tokenizer.json").write_text("{}", encoding="utf-8")
    write(directory)
    assert listing(directory) == MODEL_FILES and listing(tmp_path) == ["model"]
    assert {tensor.dtype.name for tensor in load_file(directory / "model.safetensors").values()} == {"float32"}


def test_an_empty_directory_is_filled(tmp_path: pathlib.Path):
    (tmp_path / "model").mkdir()
    write(tmp_path / "model")
    assert listing(tmp_path / "model") == MODEL_FILES


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["letter.txt"], "has 1 entries that are no part of a model \\(letter.txt\\) and would be deleted"),
        ([*MODEL_FILES, "photos/cat.jpg"], "has 1 entries that are no part of a model \\(photos\\)"),
        ([*MODEL_FILES, "README.md/notes"], "has 1 entries that are no part of a model \\(README.md\\)"),
        (["config.json", "README.md"], "has no model.safetensors, so it is no earlier model"),
    ],
)
def test_what_is_no_earlier_model_is_left_alone(tmp_path: pathlib.Path, files: list[str], message: str):
    home = tmp_path / "home"
    for name in files:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_text("mine", encoding="utf-8")
    with pytest.raises(ValueError, match=f"{home} {message}"):
        write(home)
    assert all((home / name).read_text(encoding="utf-8") == "mine" for name in files)
    assert listing(tmp_path) == ["home"]


def test_a_file_or_a_link_is_left_alone(tmp_path: pathlib.Path):
    (tmp_path / "file").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, message in (("file", "is a file"), ("link", "is a link")):
        with pytest.raises(ValueError, match=message):
            write(tmp_path / name)


def test_a_failure_leaves_the_earlier_model_and_no_traces(tmp_path: pathlib.Path):
    directory = tmp_path / "model"
    write(directory)
    before = (directory / "model.safetensors").read_bytes()
    with pytest.raises(ZeroDivisionError):
        fill(directory, lambda partial: (partial / "config.json").write_text(str(1 / 0), encoding="utf-8"))
    assert (directory / "model.safetensors").read_bytes() == before
    assert listing(tmp_path) == ["model"]


def test_what_appeared_meanwhile_is_not_deleted(tmp_path: pathlib.Path):
    directory = tmp_path / "model"
    with pytest.raises(ValueError, match=r"letter.txt"):
        fill(directory, lambda _: (directory / "letter.txt").mkdir(parents=True))
    assert listing(directory) == ["letter.txt"] and listing(tmp_path) == ["model"]


def test_killed_between_the_renames_the_earlier_model_comes_back(tmp_path: pathlib.Path):
    directory = tmp_path / "model"
    write(directory)
    os.rename(directory, tmp_path / ".model.replaced")
    (tmp_path / ".model.partial").mkdir()
    found: list[str] = []
    fill(directory, lambda _: found.extend(listing(directory)))
    assert found == MODEL_FILES and listing(tmp_path) == ["model"] and not listing(directory)


def test_the_directory_of_a_relative_path(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(pathlib.Path("model"))
    assert listing(tmp_path / "model") == MODEL_FILES
