"""Compiled programs on disk: a second start traces, lowers and compiles nothing.

The key of a program is a digest of all that decides what it is: this package's source, the versions of what compiles
it, the devices, the flags, and the program's own description. JAX describes a program with pickle, and it is machine
code anyway: to load one is to run it. So only what `SealedFiles` believes in is looked at.
"""

import functools
import hashlib
import json
import os
import pathlib
import platform
from importlib import metadata
from typing import Any

import jax
from absl import logging
from jax.experimental import serialize_executable

from jaxinfer.programs import Program
from pallas_kernels.native.build import cpu_features
from pallas_kernels.sealed_files import SealedFiles

_MOST_BYTES = 8 * 2**30  # of all programs
_SOURCES = (
    ("jaxinfer", "*.py"),
    ("sharding_rules", "*.py"),
    ("pallas_kernels", "*.py"),
    ("pallas_kernels", "*.json"),  # tuned sizes
)


class ProgramStore:
    """Of one directory, which must be there. Raises ValueError if others could have written to it."""

    def __init__(self, directory: pathlib.Path, most_bytes: int = _MOST_BYTES):
        self._files = SealedFiles(directory, "program", most_bytes)

    def load(self, program: Program) -> jax.stages.Compiled | None:
        """None if it is not there, or not as it was written."""
        key = _key(program)
        if (payload := self._files.read(key)) is None:
            return None
        devices = program.devices
        try:
            return serialize_executable.deserialize_and_load(
                payload, *program.structures, backend=devices[0].client, execution_devices=devices
            )
        except Exception as error:  # whatever keeps it from being loaded, it can be compiled
            path = self._files.path(key)
            logging.warning("%s cannot be loaded, so the program is compiled anew: %s", path, error)
            return None

    def save(self, program: Program, compiled: jax.stages.Compiled) -> None:
        """Keeps what was compiled here and now: what JAX had in its own cache would not run when it is loaded again."""
        try:
            payload, *structures = serialize_executable.serialize(compiled)
            if tuple(structures) != program.structures:
                raise ValueError(f"{program.name} is not what it was said to be: {structures}")
            self._files.write(_key(program), payload)
        except Exception as error:  # a run without it is no worse
            logging.warning("a compiled program is not kept: %s", error)


def _key(program: Program) -> str:
    devices = [(device.platform, device.device_kind, device.id) for device in program.devices]
    about = [_environment(program.devices[0].client), devices, len(jax.devices()), program.description]
    return hashlib.sha256(json.dumps(about).encode()).hexdigest()


def _environment(client: Any) -> list[Any]:
    """What compiles, and what it is told beside the program: flags may change from one program to the next."""
    flags = sorted((name, str(value)) for name, value in jax.config.values.items() if "cache" not in name)
    environment = sorted((name, value) for name, value in os.environ.items() if name.startswith(("XLA_", "LIBTPU_")))
    return [_versions(), flags, environment, client.platform, client.platform_version, _source_digest()]


@functools.cache
def _versions() -> list[str]:
    """Of the packages that compile, and the machine that they compile for."""
    return [*map(metadata.version, ("jax", "jaxlib", "flax")), platform.machine(), cpu_features()]


@functools.cache
def _source_digest() -> str:
    """Of this package and those beside it: a version number does not change with each edit."""
    root = pathlib.Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package, pattern in _SOURCES:
        for path in sorted((root / package).rglob(pattern)):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
