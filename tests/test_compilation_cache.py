"""Where compiled programs are kept, and when they are not."""

import pathlib
from collections.abc import Iterator

import jax
import pytest

from jaxinfer import compilation_cache
from jaxinfer.compilation_cache import use_compilation_cache
from tests.command_line import run_here


@pytest.fixture(autouse=True)
def _config_as_before() -> Iterator[None]:
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    yield
    compilation_cache.keep_no_programs()
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def undecided(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process begins that has an Engine and no flags."""
    monkeypatch.setattr(compilation_cache, "_is_decided", False)


def used() -> str | None:
    return jax.config.values["jax_compilation_cache_dir"]


def test_the_flag_comes_before_the_environment_and_that_before_the_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    flag, environment, default = (str(tmp_path / name) for name in ("flag", "environment", "default"))
    monkeypatch.setattr(compilation_cache, "DEFAULT_DIR", default)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", environment)
    assert (use_compilation_cache(flag), used()) == (None, flag)
    assert (use_compilation_cache(None), used()) == (None, environment)
    assert (use_compilation_cache(""), used()) == (None, None)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    assert (use_compilation_cache(None), used()) == (None, default)
    assert pathlib.Path(default).stat().st_mode & 0o777 == 0o700


def test_a_directory_that_cannot_be_made_costs_the_cache_and_not_the_run(tmp_path: pathlib.Path):
    (tmp_path / "file").touch()
    problem = use_compilation_cache(str(tmp_path / "file" / "cache"))
    assert problem is not None and problem.startswith("compiled programs are not kept: [Errno ")
    assert "\n" not in problem and used() is None


@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_a_directory_that_others_may_write_to_is_not_used(tmp_path: pathlib.Path, mode: int):
    """What is read from it is machine code."""
    tmp_path.chmod(mode)
    problem = use_compilation_cache(str(tmp_path))
    assert problem == f"compiled programs are not kept: others may write to {tmp_path}; run chmod go-w {tmp_path}"
    assert used() is None


def test_engines_in_python_keep_programs_by_default_and_leave_jax_alone(
    undecided: None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(compilation_cache, "DEFAULT_DIR", str(tmp_path / "default"))
    before = used()
    store = compilation_cache.program_store()
    assert store is not None and (tmp_path / "default" / "programs" / "secret").exists() and used() == before
    assert compilation_cache.program_store() is store
    compilation_cache.keep_no_programs()
    assert compilation_cache.program_store() is None


def test_engines_in_python_go_on_without(
    undecided: None, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
):
    tmp_path.chmod(0o777)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert compilation_cache.program_store() is None and compilation_cache.program_store() is None
    assert [record.getMessage() for record in caplog.records] == [
        f"compiled programs are not kept: others may write to {tmp_path}; run chmod go-w {tmp_path}"
    ]


def test_the_command_warns_and_goes_on(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    tmp_path.chmod(0o777)
    assert run_here("--prompt=abc", "--model=/nowhere", f"--compilation_cache_dir={tmp_path}") == 1
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("run_inference: warning: compiled programs are not kept: others may write")
    assert error.startswith("run_inference: error: --model=/nowhere")
