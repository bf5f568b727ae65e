"""Keeps compiled programs on disk, so that a second start compiles nothing."""

import os
import pathlib
import threading

import jax
from absl import logging
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from jaxinfer.program_store import ProgramStore
from pallas_kernels.sealed_files import make_private, not_private

DEFAULT_DIR = "~/.cache/jaxinfer/xla"
_PROGRAMS = "programs"  # below it

_store: ProgramStore | None = None
_is_decided = False  # where programs are kept: False until somebody asks


def use_compilation_cache(directory: str | None) -> str | None:
    """Keeps programs in `directory`: "" for nowhere, None for JAX_COMPILATION_CACHE_DIR or else `DEFAULT_DIR`.

    Whole programs of engines in one process, by `program_store`; what else JAX compiles in its own cache. Returns why
    it is not used, if it cannot be: without it a run starts later and is no worse.
    """
    path, problem = _decide(directory)
    jax.config.update("jax_compilation_cache_dir", str(path) if _store else None)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return problem


def program_store() -> ProgramStore | None:
    """Where this process keeps the programs of its engines; None: nowhere.

    Where nobody has decided, it is where `use_compilation_cache(None)` would, and JAX's own cache is left alone.
    """
    if jax.process_count() > 1:
        return None
    if not _is_decided and (problem := _decide(None)[1]):
        logging.warning("%s", problem)
    return _store


def keep_no_programs() -> None:
    """From now on."""
    _decide("")


def _decide(directory: str | None) -> tuple[pathlib.Path, str | None]:
    """The directory that is meant, and why it cannot be used if it cannot."""
    global _store, _is_decided
    if directory is None:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT_DIR)
    path, found, problem = pathlib.Path(directory), None, None
    if directory:
        try:
            path = path.expanduser()
            found = _make_ready(path)
        except (OSError, RuntimeError, ValueError) as error:  # RuntimeError: no home to expand "~" to
            problem = f"compiled programs are not kept: {error}"
    _store, _is_decided = found, True
    return path, problem


def _make_ready(directory: pathlib.Path) -> ProgramStore:
    """Makes the directory, private. Raises ValueError if others may write to it: what is in it gets executed."""
    if problem := not_private(make_private(directory)):
        raise ValueError(problem)
    return ProgramStore(make_private(directory / _PROGRAMS))


class _WithoutCache:
    """Of JAX: it writes what is compiled without a GPU, and cannot read it; and what it read cannot be kept by us."""

    _NAME = "jax_enable_compilation_cache"

    def __init__(self):
        self._lock, self._num_inside, self._was_enabled = threading.Lock(), 0, False

    def __enter__(self) -> None:
        with self._lock:
            if self._num_inside == 0:
                self._was_enabled = getattr(jax.config, self._NAME)
                self._enable(False)
            self._num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._num_inside -= 1
            if self._num_inside == 0:
                self._enable(self._was_enabled)

    def _enable(self, is_enabled: bool) -> None:
        jax.config.update(self._NAME, is_enabled)
        jax_cache.reset_cache()  # or what it found before is still believed


without_cache = _WithoutCache()
