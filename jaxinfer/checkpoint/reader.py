"""Weights of a model directory, whichever format it has."""

import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxinfer.checkpoint import hf_reader, manifest
from jaxinfer.checkpoint.hf_index import listed
from jaxinfer.parameters import ModelDefinition

HUGGING_FACE, ORBAX = "huggingface", "orbax"


def format_of(model_dir: pathlib.Path) -> str:
    """HUGGING_FACE or ORBAX; ValueError for what is half of a conversion."""
    if manifest.is_there(model_dir):
        found = manifest.read(model_dir)["about"].get("format")
        if found not in (HUGGING_FACE, ORBAX):
            raise ValueError(f"{model_dir}: {manifest.MANIFEST} says format {found!r}; known: {HUGGING_FACE}, {ORBAX}")
        return found
    if (model_dir / manifest.ORBAX_DIRECTORY).exists():
        raise ValueError(f"{model_dir}: Orbax weights without {manifest.MANIFEST}; convert_checkpoint writes one")
    return HUGGING_FACE


def load_weights(
    model_dir: pathlib.Path, definition: ModelDefinition, progress: Callable[[int, int], None] | None = None
) -> tuple[jax.Array, ...]:
    """The arrays of `definition.params`, in their order, dtypes and shardings.

    `progress(bytes_done, bytes_total)` is called now and then; bytes are those of `definition.weight_bytes`. Raises
    ValueError, before anything is sent to a device, for a directory that is broken or of another model.
    """
    if format_of(model_dir) == HUGGING_FACE:
        return hf_reader.load_weights(model_dir, definition, progress)
    from jaxinfer.checkpoint import orbax_weights  # Orbax takes a third of a second to import

    check_matches(model_dir, definition)
    arrays = orbax_weights.load(model_dir, definition, progress)
    if definition.dtype == jnp.float16:  # Orbax casts without a word
        infinite = [spec.path for spec, array in zip(definition.params, arrays, strict=True) if _is_infinite(array)]
        if infinite:
            beyond = f"values beyond float16's 65504: {listed(infinite)}"
            raise ValueError(f"{model_dir}: {beyond}; use --dtype=bfloat16 or --dtype=float32")
    return arrays


def _is_infinite(array: jax.Array) -> bool:
    """In a part that this process has."""
    return any(bool(jnp.isinf(shard.data).any()) for shard in array.addressable_shards)


def about_params(definition: ModelDefinition, dtypes: dict[str, np.dtype]) -> dict[str, Any]:
    """Shape and dtype of each parameter in an Orbax directory, for its manifest."""
    return {path: [shape, dtypes[path].name] for path, shape in _shapes(definition).items()}


def _shapes(definition: ModelDefinition) -> dict[str, list[int]]:
    num_kv_heads = definition.config.num_kv_heads
    return {spec.path: list(spec.shape_once(num_kv_heads)) for spec in definition.params}


def check_matches(model_dir: pathlib.Path, definition: ModelDefinition) -> None:
    """Raises ValueError unless an Orbax directory has exactly the model's parameters: Orbax would cut and pad."""
    found, expected = manifest.read(model_dir)["about"]["params"], _shapes(definition)
    if found.keys() != expected.keys():
        raise ValueError(
            f"{model_dir}: the weights are not those of config.json's {definition.config.family} model: missing "
            f"{listed(expected.keys() - found.keys())}; left over {listed(found.keys() - expected.keys())}"
        )
    if wrong := [path for path, shape in expected.items() if found[path][0] != shape]:
        shapes = f"{wrong[0]} has shape {found[wrong[0]][0]}, expected {expected[wrong[0]]}"
        raise ValueError(f"{model_dir}: parameters that do not fit config.json: {listed(wrong)}; {shapes}")
