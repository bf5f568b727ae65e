"""Compiled programs on disk: a second start traces, lowers and compiles nothing.

    DIRECTORY/secret            32 random bytes
    DIRECTORY/KEY.program       their MAC over the key and the rest, then the rest: what JAX makes of a program

The key is a digest of all that decides what a program is: this package's source, the versions of what compiles it, the
devices, the flags, and the program's own description. JAX describes a program with pickle, and it is machine code
anyway: to load one is to run it. So a file is looked at only if the directory is this user's and nobody else may write
to it, and only if its MAC shows that it was written with the secret that lies there, under that key: what is damaged,
or was put there by somebody else, is compiled anew.
"""

import contextlib
import functools
import hashlib
import hmac
import json
import os
import pathlib
import platform
import secrets
import stat
import tempfile
from importlib import metadata
from typing import Any

import jax
from absl import logging
from jax.experimental import serialize_executable

from jaxinfer.programs import Program

_MOST_BYTES = 8 * 2**30  # of all programs; those that were not used for the longest time go first
_MAC_BYTES = hashlib.sha256().digest_size
_SOURCES = (
    ("jaxinfer", "*.py"),
    ("sharding_rules", "*.py"),
    ("pallas_kernels", "*.py"),
    ("pallas_kernels", "*.json"),  # tuned sizes
)


class ProgramStore:
    """Of one directory, which must be there. Raises ValueError if others could have written to it."""

    def __init__(self, directory: pathlib.Path, most_bytes: int = _MOST_BYTES):
        self._directory, self._most_bytes = directory, most_bytes
        if problem := not_private(directory):
            raise ValueError(problem)
        self._secret = _read_secret(directory / "secret")

    def load(self, program: Program) -> jax.stages.Compiled | None:
        """None if it is not there, or not as it was written."""
        key = _key(program)
        path = self._path(key)
        try:
            mac, payload = (content := path.read_bytes())[:_MAC_BYTES], content[_MAC_BYTES:]
            os.utime(path)
        except OSError:
            return None
        if not hmac.compare_digest(mac, self._mac(key, payload)):
            logging.warning("%s is damaged, or was not written here: the program is compiled anew", path)
            return None
        devices = program.devices
        try:
            return serialize_executable.deserialize_and_load(
                payload, *program.structures, backend=devices[0].client, execution_devices=devices
            )
        except Exception as error:  # whatever keeps it from being loaded, it can be compiled
            logging.warning("%s cannot be loaded, so the program is compiled anew: %s", path, error)
            return None

    def save(self, program: Program, compiled: jax.stages.Compiled) -> None:
        """Keeps what was compiled here and now: what JAX had in its own cache would not run when it is loaded again."""
        try:
            payload, *structures = serialize_executable.serialize(compiled)
            if tuple(structures) != program.structures:
                raise ValueError(f"{program.name} is not what it was said to be: {structures}")
            key = _key(program)
            self._write(self._path(key), self._mac(key, payload) + payload)
        except Exception as error:  # a run without it is no worse
            logging.warning("a compiled program is not kept: %s", error)

    def _write(self, path: pathlib.Path, content: bytes) -> None:
        """Whole or not at all."""
        with tempfile.TemporaryDirectory(dir=self._directory) as beside:
            (new := pathlib.Path(beside) / path.name).write_bytes(content)
            new.replace(path)
        self._make_room()

    def _make_room(self) -> None:
        found = [(path, path.stat()) for path in self._directory.glob("*.program")]
        excess = sum(about.st_size for _, about in found) - self._most_bytes
        for path, about in sorted(found, key=lambda entry: entry[1].st_mtime):
            if excess <= 0:
                break
            path.unlink(missing_ok=True)
            excess -= about.st_size

    def _path(self, key: str) -> pathlib.Path:
        return self._directory / f"{key}.program"

    def _mac(self, key: str, payload: bytes) -> bytes:
        return hmac.new(self._secret, key.encode() + payload, hashlib.sha256).digest()


def not_private(directory: pathlib.Path) -> str | None:
    """Why what lies in a directory may not be this user's own; None: it is."""
    about = directory.stat()
    if about.st_uid != os.geteuid():
        return f"{directory} belongs to another user"
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"others may write to {directory}; run chmod go-w {directory}"
    return None


def _read_secret(path: pathlib.Path) -> bytes:
    """Made by whoever comes first; the same for all."""
    with tempfile.NamedTemporaryFile(dir=path.parent) as file:
        file.write(secrets.token_bytes(_MAC_BYTES))
        file.flush()
        with contextlib.suppress(FileExistsError):
            os.link(file.name, path)
    return path.read_bytes()


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
    return [*map(metadata.version, ("jax", "jaxlib", "flax")), platform.machine(), _cpu_features()]


def _cpu_features() -> str:
    """That XLA compiles for; a home directory may be that of several machines."""
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@functools.cache
def _source_digest() -> str:
    """Of this package and those beside it: a version number does not change with each edit."""
    root = pathlib.Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for package, pattern in _SOURCES:
        for path in sorted((root / package).rglob(pattern)):
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()
