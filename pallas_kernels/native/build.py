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
import subprocess
import tempfile
import threading
from importlib import metadata

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
        library = _load(_library())
    except (OSError, RuntimeError) as error:
        return str(error)
    for target in TARGETS:
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, target)), platform="cpu")
    return None


def takes_time() -> bool:
    """Whether `unavailable` has to compile first, for seconds: JAX runs on a CPU, and no earlier start has done so."""
    kept = os.path.join(os.path.expanduser(DIRECTORY), f"{_key()}.so")
    return jax.default_backend() == "cpu" and hasattr(os, "memfd_create") and not os.path.exists(kept)


def cpu_features() -> str:
    """That is compiled for; a home directory may be that of several machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _library() -> bytes:
    """The shared library, from an earlier start or compiled now."""
    try:
        files = SealedFiles(make_private(pathlib.Path(DIRECTORY).expanduser()), "so", _MOST_BYTES)
    except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home to expand "~" to
        _logger.warning("kernels for this CPU are compiled anew at each start: %s", error)
        return _compile()
    key = _key()
    if (library := files.read(key)) is None:
        library = _compile()
        try:
            files.write(key, library)
        except OSError as error:
            _logger.warning("kernels for this CPU are compiled anew at the next start: %s", error)
    return library


def _key() -> str:
    """Of all that decides what the compiler makes, but for its own version: what an older one made is right too."""
    about = [*_FLAGS, metadata.version("jaxlib"), platform.machine(), cpu_features()]
    digest = hashlib.sha256(repr(about).encode())
    for path in sorted(path for path in _FOLDER.iterdir() if path.suffix in (".cc", ".h")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _compile() -> bytes:
    """RuntimeError if there is no compiler, or it cannot."""
    _logger.info("compiling kernels for this CPU")
    with tempfile.TemporaryDirectory() as directory:
        out = pathlib.Path(directory) / "out.so"
        command = [*_compiler(), *_FLAGS, "-isystem", jax.ffi.include_dir(), "-o", out, _FOLDER / _SOURCE]
        try:
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=_TIMEOUT_S)
        except subprocess.CalledProcessError as error:
            message = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr[-200:])
            raise RuntimeError(f"{command[0]} cannot compile {_SOURCE}: {message.strip()}") from None
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"{command[0]} was not done with {_SOURCE} after {_TIMEOUT_S} s") from None
        return out.read_bytes()


def _compiler() -> list[str]:
    """As CXX has it, which may have arguments; else the first of the usual ones that is there."""
    if command := shlex.split(os.environ.get("CXX", "")):
        return command
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise RuntimeError("there is no C++ compiler: install g++, or name one in CXX")
    return [found]


def _load(library: bytes) -> ctypes.CDLL:
    """From memory, so that what runs is what was checked, whatever happens to the file."""
    descriptor = os.memfd_create("jaxinfer")
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(library)
        return ctypes.CDLL(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
