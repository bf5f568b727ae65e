"""Writes a model directory beside the place it is meant for, and moves it there when it is whole."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Iterator

# What a directory must have to count as a model, and what it may have: anything else is somebody's own.
_REQUIRED = {"config.json", "model.safetensors"}
_KNOWN = _REQUIRED | set(
    """README.md added_tokens.json chat_template.jinja generation_config.json merges.txt special_tokens_map.json
    tokenizer.json tokenizer.model tokenizer_config.json vocab.json""".split()
)


@contextlib.contextmanager
def replaced(directory: pathlib.Path) -> Iterator[pathlib.Path]:
    """An empty directory to fill, which takes the place of `directory` when the block ends.

    An exception in the block leaves things as they were. `directory` may be absent, empty, or a model of one file;
    raises ValueError for any other, because it would be deleted. Of a program that is killed the two hidden
    neighbours `.name.partial` and `.name.replaced` may stay; the next call tidies them up, and puts the second back
    where it was killed between the two renames.
    """
    if directory.is_symlink():
        raise ValueError(f"{directory} is a link; name the directory itself")
    directory = directory.resolve()
    partial, old = (directory.with_name(f".{directory.name}.{state}") for state in ("partial", "replaced"))
    _put_back(old, directory)
    _check_may_be_deleted(directory)
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)
    partial.mkdir(parents=True)
    try:
        yield partial
        _check_may_be_deleted(directory)  # again: training that ends in this block takes hours
        if directory.exists():
            os.rename(directory, old)
        os.rename(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _put_back(old, directory)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _put_back(old: pathlib.Path, directory: pathlib.Path) -> None:
    if old.exists() and not directory.exists():
        os.rename(old, directory)


def _check_may_be_deleted(directory: pathlib.Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; name a directory to write the model to")
    paths = sorted(directory.iterdir())
    names = {path.name for path in paths}
    foreign = [path.name for path in paths if path.name not in _KNOWN or not path.is_file()]
    if foreign:
        raise ValueError(
            f"{directory} has {len(foreign)} entries that are no part of a model ({', '.join(foreign[:5])}) and would "
            f"be deleted; name a new directory, or an earlier model"
        )
    if names and not names >= _REQUIRED:
        missing = " and no ".join(sorted(_REQUIRED - names))
        raise ValueError(
            f"{directory} has no {missing}, so it is no earlier model, and its files would be "
            f"deleted; name a new directory"
        )
