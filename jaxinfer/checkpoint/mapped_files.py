"""Safetensors files, which are mapped into memory: opened once for many reads, but not for any number of bytes."""

import contextlib
import math
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import safetensors

from jaxinfer.checkpoint.layout import Slices

_MAPPED_BYTES = 1 << 26  # of reads, before files are closed


class MappedFiles:
    """Opens a file at the first read, and closes all with the block or when enough was read of them.

    Opening parses a header, which names every tensor of the file: not to be done for each of a layer's experts. But
    the pages that were touched count as resident until the file is unmapped, so it is mapped anew now and then.
    """

    def __init__(self):
        self._files: dict[pathlib.Path, Any] = {}
        self._stack = contextlib.ExitStack()
        self._num_bytes = 0

    def __enter__(self) -> "MappedFiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def read(self, path: pathlib.Path, name: str, slices: Slices) -> np.ndarray:
        """A copy of these slices of a tensor, in the stored dtype. Raises ValueError for a file that is broken."""
        if self._num_bytes >= _MAPPED_BYTES:
            self._close()
        with named_errors(path):
            if path not in self._files:
                self._files[path] = self._stack.enter_context(safetensors.safe_open(path, framework="numpy"))
            tensor = self._files[path].get_slice(name)
            data = tensor[slices]
        row_size = math.prod(tensor.get_shape()[1:])  # of a part of a row, the pages of all of it
        self._num_bytes += len(data) * row_size * data.itemsize
        return data

    def _close(self) -> None:
        self._stack.close()
        self._files.clear()
        self._num_bytes = 0


@contextlib.contextmanager
def named_errors(path: pathlib.Path) -> Iterator[None]:
    """safetensors' errors, and the system's, become ValueErrors that name the file."""
    try:
        yield
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(f"{path}: corrupt, truncated or unreadable: {error}") from None
