"""Models and prompts that can be made again anywhere: weights from a seed and a rule, never stored.

The scale of the weights is what makes a comparison bite: with weights near zero attention is uniform and the
logits are constant, and almost any mistake passes.
"""

import json
import pathlib
import zlib
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from jaxinfer import models
from jaxinfer.checkpoint import layout
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

PROMPT_LENGTHS = (4, 600)  # the second crosses pages and chunks, and turns every rotary pair far
NUM_TOKENS = 64  # generated after each prompt
CASES = [(family, name) for family in models.decoders() for name in models.get(family).TINY_CONFIGS]
ENCODER_CASES = [(family, name) for family in models.encoders() for name in models.get(family).TINY_CONFIGS]

_MATRIX_GAIN = 1.5  # over 1 / sqrt(inputs): scores of standard deviation 2, so that attention picks
_EMBEDDING_STDDEV = 0.3  # small enough that the norm's epsilon can be seen
_BIAS_STDDEV = 0.3
_SINK = 4.0  # large enough to act beside hundreds of tokens' scores


def tiny_config(family: str, name: str) -> dict[str, Any]:
    return models.get(family).TINY_CONFIGS[name]


def first_config(family: str) -> dict[str, Any]:
    """The one that divides over eight devices."""
    return next(iter(models.get(family).TINY_CONFIGS.values()))


def weights(family: str, hf_config: dict[str, Any], seed: int = 0) -> dict[str, np.ndarray]:
    """float32 checkpoint tensors by name. Each has a generator of its own: the order does not matter."""
    module = models.get(family)
    config = module.parse_config(HFConfig(hf_config))
    definition = ModelDefinition.create(config, Partitioner.create(), np.dtype(np.float32))
    parts = layout.tensors(layout.stored_params(definition))
    return {name: _tensor(name, of_name, seed) for name, of_name in parts.items()}


def _tensor(name: str, parts: list[layout.StoredParam], seed: int) -> np.ndarray:
    shape = layout.tensor_shape(parts)
    # RandomState and not Generator: NumPy promises that its numbers never change.
    normal = np.random.RandomState([seed, zlib.crc32(name.encode())]).standard_normal(shape)
    if name.endswith("sinks"):
        values = _SINK + normal
    elif name.endswith("bias"):
        values = _BIAS_STDDEV * normal
    elif len(shape) == 1:
        values = 1 + 0.2 * normal  # a norm's scale
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            values *= _MATRIX_GAIN  # else normalised queries and keys would have scores too small to pick
    elif "embedding" in parts[0].spec.path:
        values = _EMBEDDING_STDDEV * normal
    else:
        values = _MATRIX_GAIN * normal / np.sqrt(shape[-2] if parts[0].is_transposed else shape[-1])
    return values.astype(np.float32)


def prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    return np.random.RandomState([seed, length]).randint(0, vocab_size, length).tolist()


def write_model(directory: pathlib.Path, hf_config: dict[str, Any], tensors: dict[str, np.ndarray]) -> pathlib.Path:
    """A Hugging Face directory, its config.json exactly `hf_config`."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(hf_config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
