"""Keeps compiled programs on disk, so that a second start compiles nothing."""

import os
import pathlib
import stat

import jax

DEFAULT_DIR = "~/.cache/jaxinfer/xla"


def use_compilation_cache(directory: str | None) -> str | None:
    """Keeps programs in `directory`: "" for nowhere, None for JAX_COMPILATION_CACHE_DIR or else `DEFAULT_DIR`.

    Returns why it is not used, if it cannot be: without it a run starts later and is no worse.
    """
    if directory is None:
        directory = os.environ.get("JAX_COMPILATION_CACHE_DIR", DEFAULT_DIR)
    problem = _make_ready(directory) if directory else None
    path = str(pathlib.Path(directory).expanduser()) if directory and not problem else None
    jax.config.update("jax_compilation_cache_dir", path)
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return problem


def _make_ready(directory: str) -> str | None:
    """Makes the directory, private; the reason if it cannot be used."""
    try:
        path = pathlib.Path(directory).expanduser()
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        is_open = path.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home to expand "~" to
        return f"compiled programs are not kept: {error}"
    if is_open:  # what is in it gets executed
        return f"compiled programs are not kept: others may write to {path}; run chmod go-w {path}"
    return None
