"""The files of a model directory, which is something downloaded: what is read lies inside it. Host only."""

import json
import os
import pathlib
from collections.abc import Iterator
from typing import Any


def check_files(model_dir: pathlib.Path) -> None:
    """Raises ValueError for a link anywhere in the directory that leads out of it, and for a pipe or a device.

    What is read afterwards needs no look of its own.
    """
    root = model_dir.resolve()
    try:
        for entry in _entries(model_dir):
            if entry.is_symlink():
                _check_link(root, pathlib.Path(entry.path))
            elif not entry.is_file() and not entry.is_dir():
                raise ValueError(f"{entry.path} is not a regular file")  # opening a pipe waits for ever
    except OSError as error:
        raise ValueError(f"{model_dir}: cannot be looked through: {error}") from None


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """Raises ValueError for any other content."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _entries(directory: str | pathlib.Path) -> Iterator[os.DirEntry[str]]:
    """Of all its folders, but for linked ones."""
    with os.scandir(directory) as entries:
        for entry in entries:
            yield entry
            if entry.is_dir(follow_symlinks=False):
                yield from _entries(entry.path)


def _check_link(root: pathlib.Path, path: pathlib.Path) -> None:
    """Raises ValueError if it leads out of the directory, whether anything is there or not.

    The one place outside that counts as inside is the store that Hugging Face's download cache links files to:
    models--org--name/snapshots/<commit>/model.safetensors -> models--org--name/blobs/<sha256>.
    """
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ValueError(f"{path}: cannot be found: {error}") from None
    is_blob = root.parent.name == "snapshots" and target.parent == root.parents[1] / "blobs"
    if not target.is_relative_to(root) and not (is_blob and (target.is_file() or not target.exists())):
        raise ValueError(
            f"{path} is a link that leads out of the directory, to {target}; put the file itself there, or remove the "
            f"link"
        )
