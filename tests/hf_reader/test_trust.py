"""Directories that are not to be trusted: names that are paths, links out of them, pipes."""

import os
import pathlib

import pytest
from safetensors.numpy import save_file

from jaxinfer.checkpoint.hf_index import SINGLE_FILE
from jaxinfer.checkpoint.hf_reader import load_weights
from tests.hf_reader.directory import SHARD, Q, assert_refused, change_index, define, split


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
    os.rename(model / "config.json", snapshot / "config.json")
    (snapshot / SINGLE_FILE).symlink_to("../../blobs/123")
    load_weights(snapshot, define())
    os.rename(blobs / "123", tmp_path / "hub" / "123")
    (snapshot / SINGLE_FILE).unlink()
    (snapshot / SINGLE_FILE).symlink_to("../../123")
    assert_refused(snapshot, "is a link that leads out of the directory")
