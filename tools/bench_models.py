"""The random Llamas of the benchmarks: their speed is that of real ones of the same shape."""

import pathlib
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import models
from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}
_NAMES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads".split()
SHAPES = {
    "12m": (8192, 256, 704, 10, 8, 8),
    "46m": (16000, 512, 1408, 10, 8, 8),
    "61m": (16000, 512, 1408, 14, 8, 8),
    "125m": (32000, 768, 2048, 12, 12, 4),
    "254m": (32000, 1024, 2816, 16, 16, 8),
    "476m": (32000, 1536, 4096, 15, 24, 8),
    "8b": (128256, 4096, 14336, 32, 32, 8),
}


def hf_config(shape: str, num_layers: int | None = None) -> dict[str, Any]:
    """config.json of one of `SHAPES`, or of its first `num_layers` layers."""
    config = _LLAMA | dict(zip(_NAMES, SHAPES[shape], strict=True))
    return config if num_layers is None else config | {"num_hidden_layers": num_layers}


def define(hf: HFConfig, dtype: str) -> ModelDefinition:
    """The model on one device."""
    config = models.for_architecture(hf.architecture).parse_config(hf)
    return ModelDefinition.create(config, Partitioner.create(), jnp.dtype(dtype))


def write_random(model_dir: pathlib.Path, config: dict[str, Any], dtype: str) -> tuple[jax.Array, ...]:
    """Writes the model directory of `config` with random weights, and returns those."""
    definition = define(HFConfig(config), dtype)
    weights = definition.init()
    write_model(model_dir, config, definition, weights)
    return weights
