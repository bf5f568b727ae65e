"""Files are opened once for many reads, and again after so many bytes."""

import pathlib

import numpy as np
import pytest
import safetensors
from safetensors.numpy import save_file

from jaxinfer.checkpoint import hf_reader, mapped_files
from jaxinfer.checkpoint.layout import stored_params
from jaxinfer.checkpoint.mapped_files import MappedFiles
from tests.parity import driver, recipe

ROW = (slice(0, 1), slice(0, 8))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[pathlib.Path]:
    """The files, each time that one is opened to be read."""
    paths: list[pathlib.Path] = []
    safe_open = safetensors.safe_open

    def counted(path: pathlib.Path, **kwargs: str):
        paths.append(path)
        return safe_open(path, **kwargs)

    monkeypatch.setattr(mapped_files.safetensors, "safe_open", counted)
    return paths


@pytest.fixture
def path(tmp_path: pathlib.Path) -> pathlib.Path:
    save_file({name: np.full((4, 16), i, np.float32) for i, name in enumerate("abcd")}, tmp_path / "x.safetensors")
    return tmp_path / "x.safetensors"


def test_a_file_is_opened_once(path: pathlib.Path, opened: list[pathlib.Path]):
    with MappedFiles() as files:
        for i, name in enumerate("abcd"):
            np.testing.assert_array_equal(files.read(path, name, ROW), np.full((1, 8), i))
    assert opened == [path]


def test_it_is_mapped_anew_after_so_many_bytes(
    path: pathlib.Path, opened: list[pathlib.Path], monkeypatch: pytest.MonkeyPatch
):
    """Half a row counts as all of it, for its pages do."""
    monkeypatch.setattr(mapped_files, "_MAPPED_BYTES", 2 * 16 * 4)
    with MappedFiles() as files:
        rows = [files.read(path, name, ROW) for name in "abcd"]
    assert opened == [path, path]
    np.testing.assert_array_equal(np.concatenate(rows)[:, 0], range(4))  # what was read outlives the file


def test_what_was_opened_is_closed(path: pathlib.Path):
    with MappedFiles() as files:
        files.read(path, "a", ROW)
        assert str(path) in pathlib.Path("/proc/self/maps").read_text()
    assert str(path) not in pathlib.Path("/proc/self/maps").read_text()


def test_the_experts_of_a_parameter_open_their_file_once(tmp_path: pathlib.Path, opened: list[pathlib.Path]):
    model_dir = recipe.write_model(
        tmp_path / "model", recipe.first_config("mixtral"), recipe.weights("mixtral", recipe.first_config("mixtral"))
    )
    definition = driver.load_definition(model_dir)
    index = hf_reader.open_index(model_dir, definition)
    (param,) = (p for p in stored_params(definition) if p.spec.path == "layers/0/mlp/experts/up")
    assert len(param.tensors) > 2
    opened.clear()
    whole = tuple(slice(0, size) for size in param.shape)
    hf_reader.read(index, param, whole, np.dtype("float32"))
    assert len(opened) == 1
