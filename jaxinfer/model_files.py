"""The files of a model directory, which is something downloaded: what is read lies inside it. Host only."""

import json
import os
import pathlib
from typing import Any


def check_files(model_dir: pathlib.Path) -> None:
    """Raises ValueError for a link anywhere in the directory that leads out of it, and for a pipe or a device."""
    for folder, folders, files in os.walk(model_dir):
        for name in (*folders, *files):
            path = pathlib.Path(folder, name)
            if path.is_symlink():
                _check_link(model_dir, path)
            if path.exists() and not path.is_file() and not path.is_dir():
                raise ValueError(f"{path} is not a regular file")  # opening a pipe waits for ever


def resolve(model_dir: pathlib.Path, file_name: str, source: str) -> pathlib.Path:
    """A file of a model directory. Raises ValueError unless it is a regular file that belongs to the directory."""
    path = model_dir.resolve() / file_name
    target = _check_link(model_dir, path)
    if not target.exists():
        raise ValueError(f"{source}: {file_name} is missing from {model_dir}; is the download complete?")
    if not target.is_file():
        raise ValueError(f"{path} is not a regular file")
    return path


def read_json_object(path: pathlib.Path) -> dict[str, Any]:
    """Raises ValueError for any other content, and FileNotFoundError."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _check_link(model_dir: pathlib.Path, path: pathlib.Path) -> pathlib.Path:
    """Where `path` leads, which must be inside the directory.

    The one place outside that counts as inside is the store that Hugging Face's download cache links to:
    models--org--name/snapshots/<commit>/model.safetensors -> models--org--name/blobs/<sha256>.
    """
    root = model_dir.resolve()
    try:
        target = path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise ValueError(f"{path}: cannot be found: {error}") from None
    homes = [root, root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [root]
    if not any(target.is_relative_to(home) for home in homes):
        raise ValueError(f"{path} is a link that leads out of the directory, to {target}; put the file itself there")
    return target
