"""Compiles the C++ of this folder with the compiler of this machine, and keeps what comes out for the next start."""

import ctypes
import functools
import hashlib
import logging
import os
import pathlib
import platform
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from importlib import metadata
from typing import Any

import jax

from pallas_kernels.sealed_files import SealedFiles, make_private

DIRECTORY = "~/.cache/jaxinfer/native"
TARGETS = ("jaxinfer_paged_attention", "jaxinfer_matmul", "jaxinfer_draw")
_SOURCE = "kernels.cc"
_FOLDER = pathlib.Path(__file__).parent
_FLAGS = ("-O2", "-std=c++17", "-march=native", "-shared", "-fPIC")
_COMPILERS = ("g++", "clang++", "c++")
_MOST_BYTES = 64 * 2**20  # of all that is kept
_TIMEOUT_S = 120

_logger = logging.getLogger(__name__)
_lock = threading.Lock()


def unavailable() -> str | None:
    """Why there are no kernels for this machine's CPU; None: XLA knows those of `TARGETS` by their names."""
    with _lock:  # of two threads that ask first, one compiles
        return _unavailable()


@functools.cache
def _unavailable() -> str | None:
    if not hasattr(os, "memfd_create"):
        return "it needs Linux"
    try:
        handlers = _handlers()
    except (OSError, RuntimeError) as error:
        return str(error)
    for target, handler in handlers.items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(handler), platform="cpu")
    return None


def takes_time() -> bool:
    """Whether `unavailable` has to compile first, for seconds: JAX runs on a CPU, and no earlier start has done so."""
    if jax.default_backend() != "cpu" or not hasattr(os, "memfd_create") or not _compilers():
        return False
    return not os.path.exists(os.path.join(os.path.expanduser(DIRECTORY), f"{_key()}.so"))


def cpu_features() -> str:
    """That is compiled for; a home directory may be that of several machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _handlers() -> dict[str, Any]:
    """Of `TARGETS`: as an earlier start compiled them, or compiled now."""
    try:
        files = SealedFiles(make_private(pathlib.Path(DIRECTORY).expanduser()), "so", _MOST_BYTES)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home to expand "~" to
        _logger.warning("kernels for this CPU are compiled anew at each start: %s", error)
        return _load(_compile())
    key = _key()
    if (kept := files.read(key)) is not None:
        try:
            return _load(kept)
        except OSError as error:  # of a machine with other system libraries, whose home this is too
            _logger.warning("kernels for this CPU are compiled anew: %s", error)
    handlers = _load(library := _compile())
    try:
        files.write(key, library)
    except OSError as error:
        _logger.warning("kernels for this CPU are compiled anew at the next start: %s", error)
    return handlers


def _key() -> str:
    """Of all that decides what the compiler makes, but for its own version: what an older one made is right too."""
    about = [*_FLAGS, metadata.version("jaxlib"), platform.machine(), cpu_features()]
    digest = hashlib.sha256(repr(about).encode())
    for path in sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cc", ".h")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _compile() -> bytes:
    """By the first compiler that can. RuntimeError if there is none, or none can."""
    failures = []
    for compiler in _compilers():
        _logger.info("compiling kernels for this CPU")
        try:
            return _compile_by(compiler)
        except (OSError, RuntimeError) as error:
            failures.append(str(error))
    raise RuntimeError("; ".join(failures) or "there is no C++ compiler: install g++, or name one in CXX")


def _compile_by(compiler: list[str]) -> bytes:
    """RuntimeError if it cannot, OSError if it is not there."""
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "out.so"
        command = [*compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), "-o", str(out), str(_FOLDER / _SOURCE)]
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, start_new_session=True, **pipes) as process:
            try:
                _, errors = process.communicate(timeout=_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                raise RuntimeError(f"{command[0]} was not done with {_SOURCE} after {_TIMEOUT_S} s") from None
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)  # and those that it has started
        if process.returncode:
            message = next((line for line in errors.splitlines() if "error" in line), errors[-200:])
            raise RuntimeError(f"{command[0]} cannot compile {_SOURCE}: {message.strip()}")
        return out.read_bytes()


def _compilers() -> list[list[str]]:
    """What CXX says, which may have arguments; else those of the usual ones that are there."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return [command]
    return [[found] for found in map(shutil.which, _COMPILERS) if found]


def _load(library: bytes) -> dict[str, Any]:
    """From memory, so that what runs is what was checked, whatever happens to the file. OSError if it cannot be."""
    # It stays open: the loader takes two libraries of one name for the same.
    descriptor = os.memfd_create("jaxinfer")
    with open(descriptor, "wb", closefd=False) as file:
        file.write(library)
    try:
        loaded = ctypes.CDLL(f"/proc/self/fd/{descriptor}")
        return {target: getattr(loaded, target) for target in TARGETS}
    except AttributeError as error:
        raise OSError(f"a library without a kernel: {error}") from None
