"""`run_inference --dry_run`: what an engine would take of the devices that are here, without weights."""

import pathlib
import types
from typing import Any

import pytest

from jaxinfer import devices
from jaxinfer.planning import calibration, dry_run
from jaxinfer.resolve import resolve
from tests import plans, tiny_model
from tests.command_line import run_here


@pytest.fixture(autouse=True)
def rates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without measuring."""
    monkeypatch.setattr(calibration, "measure_rates", lambda: plans.CPU_RATES)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Whose weights nobody could load."""
    directory = tiny_model.make(tmp_path_factory.mktemp("models") / "tiny")
    for path in directory.glob("*.safetensors"):
        path.write_bytes(b"")
    return directory


def test_it_says_what_would_fit_and_how_fast_it_would_be(model_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert run_here(f"--model={model_dir}", "--dry_run", "--mesh=data:2,tensor:2", "--max_num_seqs=4") == 0
    out, _ = capsys.readouterr()
    assert "memory per device:" in out and "programs to compile:" in out
    assert "data:2,tensor:2" in out and "20 GB/s of weights" not in out, "each device has its share"
    assert "5 GB/s of weights" in out


def test_an_engine_that_would_not_fit_is_refused_as_when_it_runs(
    model_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]
):
    assert run_here(f"--model={model_dir}", "--dry_run", "--kv_cache_bytes=1") == 1
    assert "--kv_cache_bytes=1 is less than" in capsys.readouterr().err


def test_a_device_that_does_not_say_what_is_free(
    model_dir: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(dry_run, "resolve", lambda config: resolve(config, lambda device: None))
    assert run_here(f"--model={model_dir}", "--dry_run", "--max_num_seqs=4") == 0
    assert "a cpu does not say how much memory is free" in capsys.readouterr().out
    monkeypatch.setattr(devices, "free_bytes", lambda device: None)
    with pytest.raises(RuntimeError, match="does not say how much memory is free"):
        calibration.cpu_cluster(1)


def test_gpus_of_one_process_are_one_node():
    """However many are usual: what is here is what links are planned for."""
    mesh = types.SimpleNamespace(device_kind="NVIDIA L40S", platform="gpu", num_devices=8)
    resolved: Any = types.SimpleNamespace(definition=types.SimpleNamespace(partitioner=mesh))
    cluster = dry_run._cluster(resolved)
    assert cluster is not None and (cluster.num_nodes, cluster.devices_per_node) == (1, 8)
    mesh.device_kind = "NVIDIA RTX of next year"
    assert dry_run._cluster(resolved) is None
