"""Finds the tensors of a Hugging Face model directory: safetensors only, headers first, data slice by slice.

A model directory is something downloaded, so the names in its index are not believed: each must be a plain
file name, and a link must not lead out of the directory.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import safetensors

from jaxinfer.checkpoint import mxfp4
from jaxinfer.checkpoint.layout import Slices
from jaxinfer.checkpoint.mapped_files import MappedFiles, named_errors
from jaxinfer.hf_config import HFConfig

DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}  # by safetensors' spelling
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
OTHER_FORMATS = (".bin", ".ckpt", ".gguf", ".h5", ".msgpack", ".pt", ".pth")

ReadTensor = Callable[[str, Slices], np.ndarray]


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, as the file's header describes it.

    Attributes:
      shape: as stored.
      dtype: in safetensors' spelling, such as "BF16".
      path: the file that holds it.
    """

    shape: tuple[int, ...]
    dtype: str
    path: pathlib.Path


@dataclasses.dataclass(frozen=True)
class TensorIndex:
    """Every tensor of a model directory, by name. Holds no file open.

    Attributes:
      tensors: those packed in MXFP4 among them, as the bfloat16 that they are read as.
      packed: of these the blocks and the scales, by the tensor's name.
      left_out: what all names begin with, but not in the files.
    """

    model_dir: pathlib.Path
    tensors: Mapping[str, StoredTensor]
    packed: Mapping[str, tuple[StoredTensor, StoredTensor]]
    left_out: str = ""

    @classmethod
    def open(cls, model_dir: pathlib.Path) -> "TensorIndex":
        """Reads headers only. Raises ValueError for a directory that is not whole or not to be trusted."""
        config = HFConfig.read(model_dir)  # which looks at all files, before any is opened
        tensors = _read_headers(model_dir)
        if config.quant_method is None:
            return cls(model_dir, tensors, {})
        try:
            packed = {name: _pair(tensors, name) for name in mxfp4.packed_names(tensors)}
            unpacked = {name: _unpacked(name, *pair) for name, pair in packed.items()}
        except ValueError as error:
            raise ValueError(f"{model_dir}: {error}") from None
        parts = {name + end for name in packed for end in (mxfp4.BLOCKS, mxfp4.SCALES)}
        return cls(model_dir, {name: tensors[name] for name in tensors.keys() - parts} | unpacked, packed)

    def with_prefix(self, prefix: str) -> "TensorIndex":
        """The same with names that begin with `prefix`, as in other files of the family; the head's never does."""
        if any(name.startswith(prefix) for name in self.tensors):
            return self
        names = {name: name if name.startswith("lm_head.") else prefix + name for name in self.tensors}
        tensors = {names[name]: tensor for name, tensor in self.tensors.items()}
        return dataclasses.replace(self, tensors=tensors, left_out=prefix)

    @contextlib.contextmanager
    def reader(self) -> Iterator[ReadTensor]:
        """A function that reads slices of a tensor, by its name, in the stored dtype."""
        with MappedFiles() as files:
            yield functools.partial(self._read, files)

    def _read(self, files: MappedFiles, name: str, slices: Slices) -> np.ndarray:
        if name not in self.packed:
            return files.read(self.tensors[name].path, self.in_file(name), slices)
        blocks, scales = self.packed[name]
        read_blocks = functools.partial(files.read, blocks.path, name + mxfp4.BLOCKS)
        read_scales = functools.partial(files.read, scales.path, name + mxfp4.SCALES)
        return mxfp4.read(read_blocks, read_scales, slices)

    def in_file(self, name: str) -> str:
        """What the file calls the tensor `name`."""
        return name.removeprefix(self.left_out)


def _pair(tensors: Mapping[str, StoredTensor], name: str) -> tuple[StoredTensor, StoredTensor]:
    for part in (name + mxfp4.BLOCKS, name + mxfp4.SCALES):
        if tensors[part].dtype != "U8":
            raise ValueError(f"{part} is {tensors[part].dtype}; expected U8")
    return tensors[name + mxfp4.BLOCKS], tensors[name + mxfp4.SCALES]


def _unpacked(name: str, blocks: StoredTensor, scales: StoredTensor) -> StoredTensor:
    return StoredTensor(mxfp4.unpacked_shape(name, blocks.shape, scales.shape), "BF16", blocks.path)


def _read_headers(model_dir: pathlib.Path) -> dict[str, StoredTensor]:
    """Of all files. model.safetensors comes before the index, as in transformers."""
    single, index = model_dir / SINGLE_FILE, model_dir / INDEX_FILE
    if single.is_symlink() or single.exists():
        return _read_header(_existing(single, str(model_dir)))
    if not index.exists():
        raise ValueError(_nothing_to_read(model_dir))
    weight_map = _read_weight_map(index)
    tensors: dict[str, StoredTensor] = {}
    for file_name in dict.fromkeys(weight_map.values()):
        found = _read_header(_existing(model_dir / file_name, str(index)))
        if twice := found.keys() & tensors.keys():
            other = tensors[min(twice)].path.name
            raise ValueError(f"{model_dir}: {listed(twice)} are in both {other} and {file_name}")
        tensors |= found
    _check_weight_map(index, weight_map, tensors)
    return tensors


def _existing(path: pathlib.Path, source: str) -> pathlib.Path:
    if not path.exists():
        raise ValueError(f"{source}: {path.name} is missing from {path.parent}; is the download complete?")
    return path


def listed(names: Iterable[str]) -> str:
    """The number of names and the first five: "7 (a, b, c, d, e, ...)"."""
    names = sorted(names)
    return f"{len(names)} ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _read_header(path: pathlib.Path) -> dict[str, StoredTensor]:
    tensors = {}
    with named_errors(path), safetensors.safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118 (not a mapping)
            tensor = file.get_slice(name)
            tensors[name] = StoredTensor(tuple(tensor.get_shape()), tensor.get_dtype(), path)
    return tensors


def _read_weight_map(index: pathlib.Path) -> dict[str, str]:
    """File by tensor name, each checked to be the plain name of a safetensors file."""
    try:
        values = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{index}: not a readable JSON index: {error}") from None
    weight_map = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index}: weight_map is {weight_map!r}; expected an object of file names by tensor name")
    for name, file_name in weight_map.items():
        plain = isinstance(file_name, str) and not set(file_name) & set("/\\\0") and file_name.endswith(".safetensors")
        if not plain:
            raise ValueError(f"{index}: {name} is in {file_name!r}; expected the plain name of a .safetensors file")
    return weight_map


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"given twice: {listed({key for key in keys if keys.count(key) > 1})}")
    return values


def _check_weight_map(index: pathlib.Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    if absent := weight_map.keys() - tensors.keys():
        raise ValueError(f"{index}: listed there but in no file: {listed(absent)}")
    if unlisted := tensors.keys() - weight_map.keys():
        raise ValueError(f"{index}: in the files but not listed there: {listed(unlisted)}")
    if moved := [name for name, file_name in weight_map.items() if tensors[name].path.name != file_name]:
        raise ValueError(f"{index}: in another file than the one listed: {listed(moved)}")


def _nothing_to_read(model_dir: pathlib.Path) -> str:
    names = sorted(path.name for path in model_dir.iterdir()) if model_dir.is_dir() else []
    message = f"{model_dir}: neither {SINGLE_FILE} nor {INDEX_FILE} is there"
    if others := [name for name in names if name.endswith(OTHER_FORMATS)]:
        return f"{message}; only safetensors is read, not {listed(others)}"
    if parts := [name for name in names if name.endswith(".safetensors")]:
        return f"{message}; without the index the files {listed(parts)} cannot be told to be complete"
    return message
