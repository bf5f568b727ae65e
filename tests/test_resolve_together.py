"""What the processes of a job must have in common is compared before weights are loaded: flags, files, versions."""

import dataclasses
import pathlib
import re
import shutil
from collections.abc import Callable
from typing import Any, cast

import jax
import numpy as np
import pytest

from jaxinfer import devices, models, resolve_together
from jaxinfer.checkpoint import manifest
from jaxinfer.engine_config import EngineConfig
from jaxinfer.process_group import ProcessGroup
from jaxinfer.resolve import ResolvedEngine, resolve
from tests import tiny_model
from tests.parity import recipe


class FakeGroup:
    """Process 0 of two; `replies` has, by topic, what the other says to what this one does: the same, if nothing."""

    def __init__(self, **replies: Callable[[Any], Any]):
        self.replies = replies

    def all_gather(self, topic: str, value: Any) -> list[Any]:
        return [value, self.replies.get(topic.replace(" ", "_"), lambda value: value)(value)]


def config_of(model_dir: pathlib.Path, **fields: Any) -> EngineConfig:
    return EngineConfig(model=str(model_dir), **{**tiny_model.SIZES, **fields})


def together(own: EngineConfig, /, **replies: Callable[[Any], Any]) -> tuple[ResolvedEngine, list[str]]:
    return resolve_together.resolve_together(own, cast(ProcessGroup, FakeGroup(**replies)))


def facts(config: EngineConfig) -> dict[str, str]:
    """What a process with this one would tell."""
    resolved = resolve(config)
    assert isinstance(resolved, ResolvedEngine)
    return resolve_together._facts(resolved)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(autouse=True)
def same_memory(monkeypatch: pytest.MonkeyPatch):
    """Of a machine whose free memory does not change meanwhile."""
    monkeypatch.setattr(devices, "free_bytes", lambda device: 1 << 30)
    monkeypatch.setattr(resolve, "__defaults__", (devices.free_bytes, None))


def test_the_same(model_dir: pathlib.Path):
    config = config_of(model_dir)
    resolved, lines = together(config, resolved=lambda _: facts(config))
    assert resolved.memory.free_bytes == 1 << 30
    assert lines == ["mesh  over 1 processes of 1 device on 1 machine"]


def test_the_least_free_memory_counts(model_dir: pathlib.Path):
    resolved, _ = together(config_of(model_dir), free_bytes=lambda free: free - 1)
    assert resolved.memory.free_bytes == (1 << 30) - 1
    resolved, _ = together(config_of(model_dir), free_bytes=lambda free: None)
    assert resolved.memory.free_bytes == 1 << 30


def test_another_choice_for_experts_is_called_what_it_is(tmp_path: pathlib.Path):
    """And not a difference in config.json, into whose values it goes."""
    hf_config = recipe.first_config("qwen3_moe") | {"num_hidden_layers": 1}
    recipe.write_model(moe := tmp_path / "moe", hf_config, recipe.weights("qwen3_moe", hf_config))
    config = config_of(moe)
    problem = "moe_backend is xla in process 0 and triton in process 1; give all processes the same"
    with pytest.raises(ValueError, match=problem):
        together(config, resolved=lambda _: facts(dataclasses.replace(config, moe_backend="triton")))


def test_other_flags(model_dir: pathlib.Path):
    problem = "--seed is 0 in process 0 and 7 in process 1; give all processes the same"
    with pytest.raises(ValueError, match=problem):
        together(config_of(model_dir), config=lambda flags: flags | {"--seed": "7"})


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        ({"rms_norm_eps": 1e-6}, "config.json: norm_eps is 1e-05 in process 0 and 1e-06 in process 1"),
        ({"rope_theta": 5e5}, "config.json: rope is RopeConfig(theta=10000.0,"),
        ({"num_hidden_layers": 1}, "cache_spec is CacheSpec(num_slots=2,"),
        ({"max_position_embeddings": 512}, "config.json: max_position is 256 in process 0 and 512 in process 1"),
        ({"seed": 1}, "content of model.safetensors is "),
    ],
)
def test_other_files(overrides: dict[str, Any], problem: str, model_dir: pathlib.Path, tmp_path: pathlib.Path):
    other = config_of(tiny_model.make(tmp_path / "other", **overrides))
    with pytest.raises(ValueError, match=f"^{re.escape(problem)}.*; give all processes the same$"):
        together(config_of(model_dir), resolved=lambda _: facts(other))


def test_another_conversion(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    for name in ("one", "other"):
        shutil.copytree(model_dir, tmp_path / name)
        manifest.write(tmp_path / name, {"format": "huggingface", "params": {}, "name": name})
    theirs = facts(config_of(tmp_path / "other"))
    with pytest.raises(ValueError, match=r"content of jaxinfer_manifest.json is \w{16} in process 0 and \w{16} in pro"):
        together(config_of(tmp_path / "one"), resolved=lambda _: theirs)


@pytest.mark.parametrize("place", [0, 52_000, 100_000])
def test_a_file_is_known_by_pieces_of_it(place: int, tmp_path: pathlib.Path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(100_001))
    before = resolve_together._content(path)
    changed = bytearray(100_001)
    changed[place] = 1
    path.write_bytes(changed)
    assert resolve_together._content(path) != before
    path.write_bytes(bytes(100_002))
    assert resolve_together._content(path) != before


def test_another_version(model_dir: pathlib.Path):
    with pytest.raises(ValueError, match=f"jax is {re.escape(jax.__version__)} in process 0 and 0.9.0 in process 1"):
        together(config_of(model_dir), resolved=lambda facts: facts | {"jax": "0.9.0"})


def test_what_is_missing_and_what_is_long(model_dir: pathlib.Path):
    with pytest.raises(ValueError, match=r"content of more is missing in process 0 and sha256 \w{16} in process 1"):
        together(config_of(model_dir), resolved=lambda facts: facts | {"content of more": "a" * 401})


def test_devices_are_ordered_by_machine(model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[Any] = []
    monkeypatch.setattr(resolve_together, "ordered", lambda found, machines: asked.append(machines) or [*found])
    together(config_of(model_dir), machine=lambda name: name + "-2")
    assert [name.removesuffix("-2") for name in asked[0]] == [resolve_together.socket.gethostname()] * 2
    assert asked[0][1].endswith("-2")


def test_an_encoder_runs_alone(tmp_path: pathlib.Path):
    config = recipe.first_config(models.encoders()[0])
    encoder = recipe.write_model(tmp_path / "model", config, {"nothing": np.zeros(1)})  # it is not read
    with pytest.raises(ValueError, match="is an encoder, which runs in one process; start only one"):
        together(EngineConfig(model=str(encoder), max_model_len=32))
