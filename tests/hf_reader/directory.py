"""Directories of tiny models, whole ones and such as are to be refused."""

import functools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer.checkpoint.hf_index import INDEX_FILE, SINGLE_FILE
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

Tensors = dict[str, np.ndarray]
EMBED, Q = "model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"
SHARD = "model-{}-of-2.safetensors"


@functools.cache
def define(name: str = "gqa", mesh: str = "", dtype: Any = jnp.float32) -> ModelDefinition:
    config = llama.parse_config(HFConfig(llama.TINY_CONFIGS[name]))
    return ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype(dtype))


def write(directory: pathlib.Path, name: str = "gqa", dtype: Any = jnp.float32) -> tuple[pathlib.Path, Tensors]:
    """A random model's directory and its parameters by path. NumPy's numbers: `init` would be compiled first."""
    definition, rng = define(name, dtype=dtype), np.random.default_rng(0)
    arrays = tuple(jnp.asarray(rng.standard_normal(spec.shape, np.float32), dtype) for spec in definition.params)
    write_model(directory, llama.TINY_CONFIGS[name], definition, arrays)
    return directory, {spec.path: np.asarray(a) for spec, a in zip(definition.params, arrays, strict=True)}


def change(directory: pathlib.Path, edit: Callable[[Tensors], object]) -> None:
    tensors = load_file(directory / SINGLE_FILE)
    edit(tensors)
    save_file(tensors, directory / SINGLE_FILE)


def split(directory: pathlib.Path) -> tuple[Tensors, Tensors]:
    """Turns the single file into two shards and an index; returns the tensors of each."""
    tensors = load_file(directory / SINGLE_FILE)
    names = sorted(tensors)
    parts = [{n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}]
    for i, part in enumerate(parts):
        save_file(part, directory / SHARD.format(i))
    write_index(directory, {name: SHARD.format(i) for i, part in enumerate(parts) for name in part})
    (directory / SINGLE_FILE).unlink()
    return parts[0], parts[1]


def write_index(directory: pathlib.Path, weight_map: object) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def change_index(directory: pathlib.Path, **weight_map: object) -> None:
    old = json.loads((directory / INDEX_FILE).read_text())["weight_map"]
    write_index(directory, {name: file for name, file in (old | weight_map).items() if file is not None})


def assert_refused(directory: pathlib.Path, message: str, name: str = "gqa") -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_weights(directory, define(name))
    assert "\n" not in str(caught.value)
