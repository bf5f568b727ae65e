"""Kernels in C++ for this machine's CPU: compiled once, never from what somebody else wrote, and not at all costs."""

import concurrent.futures
import functools
import pathlib
import shutil
import time
from collections.abc import Callable

import jax
import numpy as np
import pytest

from pallas_kernels.native import build
from pallas_kernels.paged_attention import backend, choose, cpu
from pallas_kernels.sealed_files import SealedFiles, make_private
from tests.native_kernels import CPU, SPEC, attend, needs_compiler


@pytest.fixture
def fresh(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where kernels are kept; nothing is yet."""
    monkeypatch.setattr(build, "DIRECTORY", str(tmp_path / "native"))
    monkeypatch.setattr(build, "_unavailable", build._unavailable.__wrapped__)  # which remembers nothing
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)  # it has them, of another library
    return tmp_path / "native"


def kept(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.glob("*.so"))


def test_they_compile_wherever_there_is_a_compiler():
    """Or all tests of them would be skipped."""
    if not build._compilers():
        pytest.skip("there is no C++ compiler")
    assert build.unavailable() is None


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_each_usual_compiler_compiles_them(compiler: str):
    if shutil.which(compiler) is None:
        pytest.skip(f"there is no {compiler}")
    assert {*build._load(build._compile_by([compiler]))} == {*build.TARGETS}


@needs_compiler
def test_the_next_compiler_is_asked_if_one_cannot(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    old, usual = ["sh", "-c", "echo error: too old >&2; exit 1"], build._compilers()
    monkeypatch.setattr(build, "_compilers", lambda: [["no_such_compiler"], old])
    assert str(build.unavailable()).endswith("'no_such_compiler'; sh cannot compile kernels.cc: error: too old")
    monkeypatch.setattr(build, "_compilers", lambda: [["no_such_compiler"], old, *usual])
    assert build.unavailable() is None


@needs_compiler
@pytest.mark.parametrize("kept_library", [b"of another system", None])
def test_a_kept_library_that_cannot_be_loaded_is_compiled_anew(
    fresh: pathlib.Path, kept_library: bytes | None, monkeypatch: pytest.MonkeyPatch, caplog
):
    """None: it can, and has no kernels."""
    if kept_library is None:
        monkeypatch.setattr(build, "_SOURCE", "product.h")
        monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-x", "c++"))
        kept_library = build._compile()
        monkeypatch.undo()
    SealedFiles(make_private(fresh), "so", build._MOST_BYTES).write(build._key(), kept_library)
    monkeypatch.setattr(build, "DIRECTORY", str(fresh))
    assert {*build._handlers()} == {*build.TARGETS}
    assert "kernels for this CPU are compiled anew: " in caplog.text
    caplog.clear()
    build._handlers()
    assert not caplog.text


@needs_compiler
def test_a_second_start_compiles_nothing(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    assert build.takes_time()
    assert build.unavailable() is None and not build.takes_time()
    (path,) = kept(fresh)
    assert fresh.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(build, "_compile", lambda: pytest.fail("it is compiled again"))
    assert build.unavailable() is None and kept(fresh) == [path]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-9] + b"damaged!!", lambda b: b"\x7fELF" + b])
def test_what_is_not_as_it_was_written_is_compiled_anew(
    fresh: pathlib.Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr(build, "_compile", lambda: b"what the compiler makes")
    monkeypatch.setattr(build, "_load", lambda library: library)
    build._handlers()
    (path,) = kept(fresh)
    path.write_bytes(damage(content := path.read_bytes()))
    assert build._handlers() == b"what the compiler makes" and path.read_bytes() == content
    assert f"{path} is damaged, or was not written here" in caplog.text


def test_what_decides_what_is_compiled(monkeypatch: pytest.MonkeyPatch):
    keys = {build._key()}
    monkeypatch.setattr(build, "cpu_features", lambda: "flags: of another machine")
    keys.add(build._key())
    monkeypatch.setattr(build, "_FLAGS", ("-O0",))
    keys.add(build._key())
    monkeypatch.setattr(build, "_FOLDER", build._FOLDER.parent / "paged_attention")  # other sources: none
    keys.add(build._key())
    assert len(keys) == 4


@pytest.mark.parametrize("is_file", [False, True])
def test_without_a_directory_it_is_compiled_at_each_start(
    fresh: pathlib.Path, is_file: bool, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr(build, "_compile", lambda: b"what the compiler makes")
    if is_file:
        fresh.write_text("in the way")
    else:
        fresh.mkdir(mode=0o777)
        fresh.chmod(0o777)
    monkeypatch.setattr(build, "_load", lambda library: library)
    assert build._handlers() == b"what the compiler makes"
    assert "kernels for this CPU are compiled anew at each start: " in caplog.text and kept(fresh) == []


def test_a_home_that_cannot_be_searched_is_no_error(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """As for a user whose HOME is somebody else's. For the superuser nothing is forbidden, so it is said here."""
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert build.takes_time()


@needs_compiler
def test_threads_that_ask_at_once_compile_once(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "_unavailable", functools.cache(build._unavailable))
    compile_once, calls = build._compile, []
    monkeypatch.setattr(build, "_compile", lambda: calls.append(1) or compile_once())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: build.unavailable(), range(4))] == [None] * 4
    assert calls == [1]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no_such_compiler", "No such file or directory: 'no_such_compiler'"),
        ("false", "false cannot compile kernels.cc: "),
        ("sh -c 'echo error: of many >&2; exit 1'", "sh cannot compile kernels.cc: error: of many"),
    ],
)
def test_a_compiler_that_cannot_leaves_it_to_xla(
    fresh: pathlib.Path, compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", compiler)
    choice = choose([SPEC], CPU)
    assert choice.name == "xla" and reason in choice.passed_over["cpu"] and "\n" not in str(choice)
    with pytest.raises(ValueError, match="--attention_backend=cpu: "):
        backend("cpu", SPEC, device=CPU)
    with pytest.raises(RuntimeError, match="or use --attention_backend=xla"):
        attend(np.zeros((1, 4, 16), np.float32), np.zeros((1, 2, 16, 16), np.float32), np.arange(1))
    assert kept(fresh) == []


def test_without_a_compiler_it_says_what_to_install(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert cpu.unsupported(SPEC, CPU) == "there is no C++ compiler: install g++, or name one in CXX"
    assert not build.takes_time()


def test_elsewhere_than_on_linux_it_is_left_to_xla(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(build.os, "memfd_create")
    assert cpu.unsupported(SPEC, CPU) == "it needs Linux" and not build.takes_time()


def test_a_compiler_that_hangs_is_ended(fresh: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """With what it has started."""
    late = tmp_path / "late"
    monkeypatch.setenv("CXX", f"sh -c '(sleep 0.6; touch {late}) & wait'")
    monkeypatch.setattr(build, "_TIMEOUT_S", 0.1)
    assert cpu.unsupported(SPEC, CPU) == "sh was not done with kernels.cc after 0.1 s"
    time.sleep(1)
    assert not late.exists()
