"""Writes weights as a Hugging Face directory, tensor by tensor.

Sizes are known beforehand, so the header of the safetensors file can be written first. Host memory holds one
parameter at a time, whatever the size of the model.
"""

import gc
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jaxinfer.checkpoint.groups import groups
from jaxinfer.checkpoint.hf_index import DTYPES, INDEX_FILE, SINGLE_FILE
from jaxinfer.checkpoint.layout import StoredParam, stored_params, tensor_shape, tensors
from jaxinfer.checkpoint.replacement import replaced
from jaxinfer.parameters import ModelDefinition
from sharding_rules import axes as ax

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_FILE_BYTES = 5_000_000_000
_ALIGNMENT = 8  # bytes, of where the first tensor begins


def write_model(
    directory: pathlib.Path, hf_config: dict[str, Any], definition: ModelDefinition, arrays: tuple[jax.Array, ...]
) -> None:
    """config.json and model.safetensors into `directory`, which appears whole or not at all.

    `arrays` are in the order of `definition.params`, on any mesh. Their dtype is kept. Raises ValueError for a
    `directory` that exists and is not an earlier model. Around `write_files`, `replaced` lets a caller add files.
    """
    with replaced(directory) as partial:
        write_files(partial, hf_config, definition, arrays)


def write_files(
    directory: pathlib.Path, hf_config: dict[str, Any], definition: ModelDefinition, arrays: tuple[jax.Array, ...]
) -> None:
    """As `write_model`, straight into a directory that exists."""
    (directory / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n", encoding="utf-8")
    by_path = {spec.path: array for spec, array in zip(definition.params, arrays, strict=True)}

    def read(param: StoredParam) -> np.ndarray:
        return _stored(param, by_path[param.spec.path], definition.config.num_kv_heads)

    write_tensors(directory, definition, {path: array.dtype for path, array in by_path.items()}, read)


def write_tensors(
    directory: pathlib.Path,
    definition: ModelDefinition,
    dtypes: Mapping[str, np.dtype],
    read: Callable[[StoredParam], np.ndarray],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """The weights into a directory: one file, or an index and files of at most 5 GB, as Hugging Face has them.

    `dtypes` is by parameter, and `read` gives one with its heads merged. A file appears whole or not at all, and
    one that is there, of the same name, is left.
    """
    whole = tensors(stored_params(definition))
    read = _remembering(read)
    sizes = {
        name: math.prod(tensor_shape(parts)) * dtypes[parts[0].spec.path].itemsize for name, parts in whole.items()
    }
    files = _files(sizes)
    before, total = 0, sum(sizes.values())
    for file_name, names in files.items():
        done = before
        path, partial = directory / file_name, directory / f"{file_name}.partial"
        if not path.exists():
            with open(partial, "wb") as file:
                file.write(_header({name: whole[name] for name in names}, dtypes))
                for name in names:
                    for data in _in_file(name, whole[name], read):
                        file.write(np.ascontiguousarray(data).reshape(-1).view(np.uint8).data)
                        del data  # before the next is read
                    gc.collect(1)  # since jax 0.12 an array and its host copy are in a cycle; the young take no time
                    done += sizes[name]
                    progress(done, total)
            os.rename(partial, path)
        before += sum(sizes[name] for name in names)
    if len(files) > 1:
        weight_map = {name: file_name for file_name, names in files.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _in_file(name: str, parts: list[StoredParam], read: Callable[[StoredParam], np.ndarray]) -> Iterator[np.ndarray]:
    """The tensor `name`, piece by piece."""
    pieces = (part.of_tensor(name, read(part)) for part in parts)
    if parts[0].is_transposed:
        yield np.concatenate(list(pieces), axis=-2).swapaxes(-1, -2)
    else:
        yield from pieces


def _remembering(read: Callable[[StoredParam], np.ndarray]) -> Callable[[StoredParam], np.ndarray]:
    """`read`, that is not asked again for the parameter that it gave last: it may lie in several tensors."""
    last: dict[str, np.ndarray] = {}

    def remembered(param: StoredParam) -> np.ndarray:
        if param.spec.path not in last:
            last.clear()  # before the next, so that there is room for it
            last[param.spec.path] = read(param)
        return last[param.spec.path]

    return remembered


def _files(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Which tensors go into which file."""
    found = groups(sizes, sizes.__getitem__, _MAX_FILE_BYTES)
    if len(found) == 1:
        return {SINGLE_FILE: found[0]}
    return {f"model-{i:05}-of-{len(found):05}.safetensors": names for i, names in enumerate(found, start=1)}


def _header(whole: Mapping[str, list[StoredParam]], dtypes: Mapping[str, np.dtype]) -> bytes:
    """Length, then JSON: of each tensor its dtype, its shape and where it lies behind the header."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, parts in whole.items():
        shape, dtype = tensor_shape(parts), dtypes[parts[0].spec.path]
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype.name], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _stored(param: StoredParam, array: jax.Array, num_kv_heads: int) -> np.ndarray:
    """The parameter on the host as the file has it: one copy of each KV head and expert, heads merged."""
    # A jax.Array keeps the host copy that NumPy asks it for; this one, over the same shards, is soon forgotten.
    shards = [shard.data for shard in array.addressable_shards]
    data = np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
    one_copy = tuple(
        slice(None, None, size // num_kv_heads if axis == ax.KV_HEADS else 1)
        for size, axis in zip(param.spec.shape, param.spec.axes, strict=True)
    )
    if not param.spec.is_as_stored:
        data = data[[param.spec.placement.index(expert) for expert in range(param.shape[0])]]
    return np.ascontiguousarray(data[one_copy]).reshape(param.shape)
