"""Writes weights as a Hugging Face directory, tensor by tensor.

Sizes are known beforehand, so the header of the safetensors file can be written first. Host memory holds one
tensor at a time, whatever the size of the model.
"""

import gc
import json
import math
import pathlib
from typing import Any

import jax
import numpy as np

from jaxinfer.checkpoint.layout import StoredParam, stored_params, tensor_shape, tensors
from jaxinfer.checkpoint.replacement import replaced
from jaxinfer.parameters import ModelDefinition
from sharding_rules import axes as ax

_DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}  # safetensors' spelling
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
    num_kv_heads, by_path = definition.config.num_kv_heads, _by_path(definition, arrays)
    with open(directory / "model.safetensors", "wb") as file:
        file.write(_header(definition, arrays))
        for parts in tensors(stored_params(definition)).values():
            for part in parts:
                file.write(_stored(part, by_path[part.spec.path], num_kv_heads).reshape(-1).view(np.uint8).data)
                gc.collect(1)  # since jax 0.12 an array and its host copy are in a cycle; the young ones take no time


def _by_path(definition: ModelDefinition, arrays: tuple[jax.Array, ...]) -> dict[str, jax.Array]:
    return {spec.path: array for spec, array in zip(definition.params, arrays, strict=True)}


def _header(definition: ModelDefinition, arrays: tuple[jax.Array, ...]) -> bytes:
    """Length, then JSON: of each tensor its dtype, its shape and where it lies behind the header."""
    by_path = _by_path(definition, arrays)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, parts in tensors(stored_params(definition)).items():
        shape, dtype = tensor_shape(parts), by_path[parts[0].spec.path].dtype
        stop = start + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _DTYPE_NAMES[dtype.name], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _stored(param: StoredParam, array: jax.Array, num_kv_heads: int) -> np.ndarray:
    """The parameter on the host as the file has it: one copy of each KV head, heads merged."""
    # A jax.Array keeps the host copy that NumPy asks it for; this one, over the same shards, is soon forgotten.
    shards = [shard.data for shard in array.addressable_shards]
    data = np.asarray(jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards))
    one_copy = tuple(
        slice(None, None, size // num_kv_heads if axis == ax.KV_HEADS else 1)
        for size, axis in zip(param.spec.shape, param.spec.axes, strict=True)
    )
    return np.ascontiguousarray(data[one_copy]).reshape(param.shape)
