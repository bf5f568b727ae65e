"""What a directory that we wrote holds, and the proof that it is whole: `jaxinfer_manifest.json`, then `COMPLETE`.

The manifest lists every file with its size and sha256; COMPLETE holds the manifest's own sha256, and is written last.
Formats do not tell by themselves: a flipped bit in a safetensors file loads silently, and so do half of those in
an Orbax directory.
"""

import hashlib
import json
import pathlib
from collections.abc import Callable, Collection, Iterator
from typing import Any

from jaxinfer.model_files import check_files

MANIFEST, COMPLETE = "jaxinfer_manifest.json", "COMPLETE"
ORBAX_DIRECTORY = "weights"  # where the format is Orbax
_VERSION = 1
_BUFFER_BYTES = 1 << 22

Advance = Callable[[int, int], None]  # (bytes done, bytes in all)


def write(
    directory: pathlib.Path,
    about: dict[str, Any],
    without: Collection[str] = (),
) -> None:
    """Lists what is in `directory`, with `about`, which is anything that JSON holds, and marks it as complete.

    The files `without`, by name, will not stay.
    """
    paths = [path for path in _files(directory) if path.relative_to(directory).as_posix() not in without]
    sizes = {path: path.stat().st_size for path in paths}
    names = {path: path.relative_to(directory).as_posix() for path in paths}
    files = {names[path]: {"bytes": size, "sha256": _sha256(path)} for path, size in sizes.items()}
    text = json.dumps({"version": _VERSION, "about": about, "files": files}, indent=1) + "\n"
    (directory / MANIFEST).write_text(text, encoding="utf-8")
    (directory / COMPLETE).write_text(hashlib.sha256(text.encode()).hexdigest() + "\n", encoding="utf-8")


def is_there(directory: pathlib.Path) -> bool:
    """Whether we wrote the directory, whole or not."""
    return (directory / MANIFEST).exists()


def read(directory: pathlib.Path) -> dict[str, Any]:
    """The manifest. Raises ValueError unless it is complete, and every file of weights is there with its size.

    Other files may be edited; `verify` would say so.
    """
    try:
        text, digest = (directory / MANIFEST).read_text("utf-8"), (directory / COMPLETE).read_text("utf-8").strip()
        is_intact = hashlib.sha256(text.encode()).hexdigest() == digest
        manifest = json.loads(text) if is_intact else {}
    except FileNotFoundError as error:
        missing = pathlib.Path(error.filename).name
        raise ValueError(f"{directory}: no {missing}; the directory is half of a conversion: convert again") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory}: {MANIFEST} cannot be read: {error}") from None
    if not is_intact:
        raise ValueError(f"{directory}: {MANIFEST} is not the one that {COMPLETE} was written for")
    _check_form(directory, manifest)
    for name, listed in manifest["files"].items():
        path = directory / name
        if "/" not in name and not name.endswith(".safetensors"):
            continue
        size = path.stat().st_size if path.is_file() else None
        if size != listed["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ValueError(f"{path} {found}; {MANIFEST} says {listed['bytes']} bytes")
    return manifest


def verify(directory: pathlib.Path, progress: Advance = lambda done, total: None) -> dict[str, Any]:
    """As `read`, and every byte is what was written. Raises ValueError naming the first file that is not."""
    check_files(directory)
    manifest = read(directory)
    total, done = sum(listed["bytes"] for listed in manifest["files"].values()), 0
    for name, listed in manifest["files"].items():
        found = _sha256(directory / name, lambda n, done=done: progress(done + n, total))
        if found != listed["sha256"]:
            raise ValueError(f"{directory / name}: its sha256 is {found}; {MANIFEST} says {listed['sha256']}")
        done += listed["bytes"]
    if unlisted := sorted(_names(directory) - manifest["files"].keys()):
        raise ValueError(f"{directory}: not in {MANIFEST}: {', '.join(unlisted[:5])}{', ...' if unlisted[5:] else ''}")
    return manifest


def _check_form(directory: pathlib.Path, manifest: Any) -> None:
    """Raises ValueError for what this program did not write."""
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != _VERSION:
        raise ValueError(f"{directory}: {MANIFEST} has version {version}; this program reads {_VERSION}")
    files, about = manifest.get("files"), manifest.get("about")
    if not isinstance(files, dict) or not isinstance(about, dict) or not isinstance(about.get("params"), dict):
        raise ValueError(f"{directory}: {MANIFEST} lacks files, or what they are about")
    for name, listed in files.items():
        is_inside = not pathlib.PurePosixPath(name).is_absolute() and ".." not in pathlib.PurePosixPath(name).parts
        if not is_inside or not isinstance(listed, dict) or not listed.keys() >= {"bytes", "sha256"}:
            expected = "a file inside, with bytes and sha256"
            raise ValueError(f"{directory}: {MANIFEST} lists {name!r}: {listed!r}; expected {expected}")


def _files(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """All but our own two, in order."""
    for path in sorted(directory.rglob("*")):
        if path.is_symlink():
            raise ValueError(f"{path} is a link; a manifest lists files only")
        if path.is_file() and path.relative_to(directory).as_posix() not in (MANIFEST, COMPLETE):
            yield path


def _names(directory: pathlib.Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in _files(directory)}


def _sha256(path: pathlib.Path, progress: Callable[[int], None] = lambda done: None) -> str:
    digest, done = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while data := file.read(_BUFFER_BYTES):
            digest.update(data)
            done += len(data)
            progress(done)
    return digest.hexdigest()
