"""Experts of published sizes compile for the GPUs that kernels are for, in the memory planned. No GPU is needed."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.engine_config import EngineConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.layers.moe import MoE
from jaxinfer.memory import Demand
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from pallas_kernels.grouped_matmul import backends
from pallas_kernels.paged_attention import xla
from tests import gpu_targets

pytestmark = pytest.mark.skipif(gpu_targets.missing() is not None, reason=str(gpu_targets.missing()))

MIXTRAL = ("mixtral", 4096, {"num_experts": 8, "num_experts_per_token": 2, "mlp_dim": 14336})
QWEN = ("qwen3_moe", 2048, {"num_experts": 128, "num_experts_per_token": 8, "mlp_dim": 768})
GPT_OSS = ("gpt_oss", 2880, {"num_experts": 32, "num_experts_per_token": 4, "mlp_dim": 2880})
GPT_OSS_OF_8 = ("gpt_oss", 2880, {"num_experts": 32, "num_experts_per_token": 4, "mlp_dim": 360})
DEEPSEEK = ("deepseek", 7168, {"num_experts": 256, "num_experts_per_token": 8, "mlp_dim": 2048})
MODELS = {"mixtral": MIXTRAL, "qwen": QWEN, "gpt_oss": GPT_OSS, "gpt_oss of 8": GPT_OSS_OF_8, "deepseek": DEEPSEEK}
SMALL_BYTES = 2**20  # what the router keeps, and the places of rows
RUNS = [
    *(("h100", name, 1024, "bfloat16") for name in MODELS),
    *(("h100", name, tokens, "bfloat16") for name in ("mixtral", "gpt_oss") for tokens in (1, 64)),
    *(
        (gpu, "qwen", tokens, "bfloat16")
        for gpu in gpu_targets.EACH_CAPABILITY
        if gpu != "h100"
        for tokens in (8, 1024)
    ),
    ("a6000-48g", "qwen", 128, "bfloat16"),
    ("a6000-48g", "gpt_oss", 2048, "float16"),
    ("a6000-48g", "gpt_oss", 2048, "float32"),
]


def config(name: str, backend: str) -> ModelConfig:
    """The family's smallest, with experts of that size."""
    family, embed_dim, moe = MODELS[name]
    module = models.get(family)
    tiny = module.parse_config(HFConfig(module.TINY_CONFIGS["gqa"]))
    assert tiny.moe is not None
    return dataclasses.replace(tiny, embed_dim=embed_dim, moe=dataclasses.replace(tiny.moe, **moe, backend=backend))


def mixture(config: ModelConfig, dtype: str) -> MoE:
    kind = {"dtype": jnp.dtype(dtype), "rngs": nnx.Rngs(0)}
    return MoE(config, config.expert_layers[:1], Partitioner.create(), **kind)


def planned_bytes(config: ModelConfig, num_tokens: int, dtype: Any) -> int:
    definition = ModelDefinition.create(config, Partitioner.create(), dtype)
    demand = Demand.of(definition, config=EngineConfig(), page_size=64, attention=xla, free_bytes=None)
    return demand._mlp_bytes(num_tokens)


@pytest.mark.parametrize("backend", [name for name in backends() if name != "xla"])
@pytest.mark.parametrize(("gpu", "model", "num_tokens", "dtype"), RUNS)
def test_compiles_and_takes_the_room_that_is_planned(gpu: str, model: str, num_tokens: int, dtype: str, backend: str):
    of_model = config(model, backend)
    graph, state = nnx.split(nnx.eval_shape(lambda: mixture(of_model, dtype)))
    x = jax.ShapeDtypeStruct((1, num_tokens, of_model.embed_dim), dtype)
    compiled = gpu_targets.compile_for(gpu, lambda state, x: nnx.merge(graph, state)(x), state, x)
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and hlo is not None
    assert "multiply_kernel" in hlo
    planned = planned_bytes(of_model, num_tokens, jnp.dtype(dtype))
    assert memory.temp_size_in_bytes <= 1.02 * planned + SMALL_BYTES
    assert planned <= 1.5 * memory.temp_size_in_bytes + SMALL_BYTES
