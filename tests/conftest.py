"""Platform of the tests: eight virtual CPU devices, strict dtype promotion, compiled programs kept on disk.

Everything here is read when jax is imported, so it is set before any test module is.
JAXINFER_TEST_PLATFORM=cuda runs on GPUs instead, for the tests marked `gpu` and those marked `any_device`.
"""

import importlib.metadata
import importlib.util
import os
import pathlib
import sys
from typing import Any

import pytest

NUM_CPU_DEVICES = 8

if "jax" in sys.modules:
    raise RuntimeError(
        "jax was imported before tests/conftest.py could set up its platform; is a pytest plugin to blame?"
    )


PLATFORM = os.environ.get("JAXINFER_TEST_PLATFORM", "cpu")


def _set_up_jax() -> None:
    os.environ["JAX_PLATFORMS"] = PLATFORM
    ours = [f"--xla_force_host_platform_device_count={NUM_CPU_DEVICES}"]
    if PLATFORM == "cpu":
        # Most of a test's time is XLA compiling small programs; machine code that is not optimised takes it half of
        # that.
        ours.append("--xla_backend_optimization_level=0")
        # So does MLIR, without which jaxlib 0.10 can do; later ones end at a flag that they do not know.
        if importlib.metadata.version("jaxlib").startswith("0.10."):
            ours.append("--xla_cpu_use_fusion_emitters=false")
    flags = os.environ.get("XLA_FLAGS", "").split()
    others = [f for f in flags if f.split("=")[0] not in {flag.split("=")[0] for flag in ours}]
    os.environ["XLA_FLAGS"] = " ".join([*others, *ours])
    # A collective over eight devices waits for ever on a thread pool with fewer threads than devices.
    os.environ["PJRT_NPROC"] = "32"
    # A float32 array times a bfloat16 one is a bug here, not a float32 array.
    os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
    # Most of a test's time is XLA compiling the same small programs. Kept by JAX under a key of program and version,
    # shared by workers and runs: a second run of four tiny models takes 2 s instead of 21.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_user_cache_dir() / "jaxinfer-tests"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.2")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def _user_cache_dir() -> pathlib.Path:
    # Not a shared temporary directory: what is read back is machine code, so it must be this user's own.
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache")


_set_up_jax()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite the files in tests/golden, for review in the diff"
    )
    parser.addoption("--family-path", help="a folder of model families to test as if they were in jaxinfer/models")


def pytest_configure(config: pytest.Config) -> None:
    if folder := config.getoption("--family-path"):
        from jaxinfer import models

        models.__path__.append(folder)


@pytest.hookimpl(tryfirst=True)  # before pytest looks at -m
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if PLATFORM != "cpu" and item.get_closest_marker("any_device"):
            item.add_marker("gpu")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests run in one worker, which compiles what they share, and all of tests/engine; in their order."""
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "tests/engine" if file.startswith("tests/engine/") else file

    config.option.loadscopereorder = False
    return Scheduling(config, log)


@pytest.fixture
def update_golden(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--update-golden"))


@pytest.fixture(scope="session", autouse=True)
def _engines_keep_no_programs() -> None:
    """Tests put faults into functions, and a program on disk has none of them."""
    from jaxinfer import compilation_cache

    compilation_cache.keep_no_programs()


@pytest.fixture
def whole_contexts(monkeypatch: pytest.MonkeyPatch):
    """Attention gathers them, as on a GPU, so that its workspace is what matters most."""
    from pallas_kernels.paged_attention import xla

    monkeypatch.setattr(xla, "_CPU_BLOCK_TOKENS", 2**20)
    monkeypatch.setattr(xla, "_CPU_GROUP_ROWS", 2**20)
    monkeypatch.setattr(xla, "_CPU_TILE_TOKENS", 128)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips `parity` tests without PyTorch; where it must be there, its absence is a failure and not a skip."""
    if item.get_closest_marker("parity") and importlib.util.find_spec("torch") is None:
        if os.environ.get("JAXINFER_REQUIRE_PARITY") == "1":
            pytest.fail("JAXINFER_REQUIRE_PARITY=1, but torch is not installed")
        pytest.skip('needs PyTorch: pip install -e ".[parity]"')
