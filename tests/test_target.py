"""What compiling for GPUs that are not there needs, and says where it is missing."""

import importlib.util
import itertools
import pathlib
import shutil
from types import SimpleNamespace

import jax
import pytest

from jaxinfer.planning import target
from jaxinfer.planning.hardware import GPUS

CACHE = "jax_enable_compilation_cache"


@pytest.mark.parametrize(
    ("plugin", "has_assembler", "message"),
    [
        (None, True, "jax-cuda12-plugin (or 13) is not installed; it is in jaxinfer[cuda12]"),
        ("jax_cuda12_plugin", False, "ptxas is not installed; it is in nvidia-cuda-nvcc-cu12, or in a CUDA toolkit"),
        ("jax_cuda12_plugin", True, None),
        ("jax_cuda13_plugin", True, None),
    ],
)
def test_what_is_missing(
    plugin: str | None,
    has_assembler: bool,
    message: str | None,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "cu13" / "bin").mkdir(parents=True)
    if has_assembler:
        (tmp_path / "cu13" / "bin" / "ptxas").touch()
    installed = {plugin: SimpleNamespace(), "nvidia": SimpleNamespace(submodule_search_locations=[str(tmp_path)])}
    monkeypatch.setattr(importlib.util, "find_spec", installed.get)
    monkeypatch.setattr(shutil, "which", lambda name: None)
    reason = target.missing()
    assert reason is None if message is None else reason is not None and reason.startswith(message)


def test_an_assembler_on_the_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/local/cuda/bin/{name}")
    assert target.assembler() == pathlib.Path("/usr/local/cuda/bin/ptxas")


def test_the_description_has_the_gpus_facts():
    words = target.description(GPUS["l40s"]).split()
    facts = {word: following for word, following in itertools.pairwise(words) if word.endswith(":")}
    assert (facts["core_count:"], facts["device_memory_size:"]) == ("142", str(GPUS["l40s"].memory_bytes))
    assert (facts["memory_bandwidth:"], facts["threads_per_core_limit:"]) == ("864000000000", "1536")
    assert (facts["shared_memory_per_block_optin:"], facts["clock_rate_ghz:"]) == (str(99 * 2**10), "2.52")


def test_a_name_that_pallas_knows_is_of_a_gpu_of_the_same_capability():
    kinds = {gpu.device_kind: gpu for gpu in GPUS.values()}
    known = {"NVIDIA A10": (8, 6), "NVIDIA L40": (8, 9)}
    for kind, name in target.KNOWN_AS.items():
        assert kinds[kind].capability == known[name]


@pytest.mark.skipif(target.missing() is not None, reason=str(target.missing()))
def test_nothing_is_kept_on_disk_of_programs_for_gpus():
    mesh = jax.sharding.Mesh(target.devices(GPUS["h100"]), ("device",))
    was_enabled = getattr(jax.config, CACHE)
    with target.compiling_for(mesh):
        assert not getattr(jax.config, CACHE)
    assert was_enabled == getattr(jax.config, CACHE)


@pytest.mark.skipif(target.missing() is not None, reason=str(target.missing()))
def test_the_cache_is_off_until_the_last_has_left():
    """As of threads that compile side by side."""
    mesh = jax.sharding.Mesh(target.devices(GPUS["h100"]), ("device",))
    was_enabled = getattr(jax.config, CACHE)
    with target.compiling_for(mesh) as thorough:
        with target.compiling_for(mesh, optimized=False) as quick:
            assert quick.keys() > thorough.keys()
        assert not getattr(jax.config, CACHE)
    assert was_enabled == getattr(jax.config, CACHE)


def test_on_cpus_nothing_is_changed():
    with target.compiling_for(jax.make_mesh((2,), ("device",))) as options:
        assert options == {}
        assert getattr(jax.config, CACHE)
