"""Writes weights as a Hugging Face directory."""

import json
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from safetensors.numpy import save_file

from jaxinfer.checkpoint.layout import stored_shape
from jaxinfer.parameters import ModelDefinition


def write_model(
    directory: pathlib.Path, hf_config: dict[str, Any], definition: ModelDefinition, arrays: tuple[jax.Array, ...]
) -> None:
    """config.json and model.safetensors into `directory`, which appears whole or not at all.

    `arrays` are in the order of `definition.params`, on a mesh that repeats no KV head. Their dtype is kept.
    """
    names = definition.family.weight_names(definition.config)
    tensors = {}
    for spec, array in zip(definition.params, arrays, strict=True):
        shape = stored_shape(spec.shape, spec.axes, definition.config.num_kv_heads)
        tensors[names[spec.path]] = np.ascontiguousarray(np.asarray(array).reshape(shape))
    partial = directory.with_name(directory.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    (partial / "config.json").write_text(json.dumps(hf_config, indent=2) + "\n")
    weights = partial / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod((partial / "config.json").stat().st_mode)  # the library makes it private
    if directory.exists():
        shutil.rmtree(directory)
    os.rename(partial, directory)
