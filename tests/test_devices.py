"""The platform that JAX runs on, and what the bandwidth is measured with."""

import os
import pathlib

import jax
import pytest

from jaxinfer import bandwidth, devices


def pretend_nvidia_gpu(monkeypatch: pytest.MonkeyPatch, is_here: bool) -> None:
    monkeypatch.setattr(devices, "has_nvidia_gpu", lambda: is_here)


def test_a_gpu_that_jax_does_not_use_is_an_error_that_says_what_to_do(monkeypatch: pytest.MonkeyPatch):
    pretend_nvidia_gpu(monkeypatch, True)
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    with pytest.raises(
        RuntimeError, match=r'GPU is present but JAX runs on the CPU: .*"jaxinfer\[cuda12\]".*--allow_cpu'
    ):
        devices.check_accelerator(allow_cpu=False)
    devices.check_accelerator(allow_cpu=True)


@pytest.mark.parametrize(("has_gpu", "backend"), [(True, "gpu"), (False, "cpu")])
def test_no_error_on_the_gpu_nor_without_one(monkeypatch: pytest.MonkeyPatch, has_gpu: bool, backend: str):
    pretend_nvidia_gpu(monkeypatch, has_gpu)
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    devices.check_accelerator(allow_cpu=False)


@pytest.mark.parametrize("present", [None, "/dev/nvidia0", "/proc/driver/nvidia/gpus/0000:01:00.0"])
def test_the_driver_shows_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, present: str | None):
    (tmp_path / "proc/driver/nvidia/gpus").mkdir(parents=True)  # stays there, empty, without a GPU
    if present:
        (tmp_path / present[1:]).mkdir(parents=True)
    monkeypatch.setattr(devices.pathlib, "Path", lambda path: tmp_path / path[1:])
    assert devices.has_nvidia_gpu() is (present is not None)


def test_virtual_devices_are_refused_once_jax_is_there():
    with pytest.raises(RuntimeError, match="must be called before jax is imported"):
        devices.set_num_cpu_devices(2)


@pytest.mark.parametrize(("before", "after"), [(None, "cpu"), ("", "cpu"), ("cuda", "cuda")])
def test_the_environment_decides_before_we_prefer_the_cpu(
    monkeypatch: pytest.MonkeyPatch, before: str | None, after: str
):
    monkeypatch.delenv("JAX_PLATFORMS")
    if before is not None:
        monkeypatch.setenv("JAX_PLATFORMS", before)
    devices.prefer_cpu()
    assert os.environ["JAX_PLATFORMS"] == after


def test_the_bandwidth_is_measured_within_a_quarter_of_the_free_memory(monkeypatch: pytest.MonkeyPatch):
    device = jax.devices()[0]
    sizes = []
    ones = bandwidth.jnp.ones
    monkeypatch.setattr(bandwidth.jnp, "ones", lambda size, dtype: sizes.append(size * 4) or ones(size, dtype))
    for free in (2**40, 4 * (100 * 2**20 + 5), None):
        monkeypatch.setattr(devices, "free_bytes", lambda device, free=free: free)
        assert bandwidth.measure_read_bandwidth(device) > 1e6
    assert sizes == [256 * 2**20, 100 * 2**20, 256 * 2**20]


def test_too_little_free_memory_to_measure_the_bandwidth(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(devices, "free_bytes", lambda device: 100 * 2**20)
    with pytest.raises(RuntimeError, match="104857600 bytes are free; measuring the bandwidth takes 268435456"):
        bandwidth.measure_read_bandwidth(jax.devices()[0])


def test_cpu_devices_share_what_the_host_has(monkeypatch: pytest.MonkeyPatch):
    device = jax.devices()[0]
    for available, each in ((8003, 1000), (None, None)):
        monkeypatch.setattr(devices.host_memory, "available_bytes", lambda available=available: available)
        assert devices.free_bytes(device) == each
