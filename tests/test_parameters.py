"""What a model's parameters weigh."""

import dataclasses

import jax.numpy as jnp
import pytest

from jaxinfer import models
from jaxinfer.config import MoEConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

# Of TINY_CONFIGS["gqa"]: numbers in each layer's q, k, v and out, gate, up and down, and two norms; and a table.
HEADS, KV_HEADS, MLP, NORMS, TABLE = 2 * 8 * 16 * 64, 2 * 2 * 16 * 64, 3 * 96 * 64, 2 * 64, 128 * 64


def define(name: str, mesh: str = "", dtype: str = "float32") -> ModelDefinition:
    config = llama.parse_config(HFConfig(llama.TINY_CONFIGS[name]))
    return ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype(dtype))


@pytest.mark.parametrize(("name", "num_tables", "num_tables_read"), [("gqa", 2, 1), ("tied", 1, 1)])
def test_a_step_reads_everything_but_an_embedding_that_is_not_the_head(
    name: str, num_tables: int, num_tables_read: int
):
    layers = 2 * (HEADS + KV_HEADS + MLP + NORMS) + 64
    for dtype, itemsize in (("float32", 4), ("bfloat16", 2)):
        definition = define(name, dtype=dtype)
        assert definition.weight_bytes == definition.shard_bytes == (layers + num_tables * TABLE) * itemsize
        assert definition.step_shard_bytes == (layers + num_tables_read * TABLE) * itemsize


@pytest.mark.parametrize(("mesh", "shards", "repeats"), [("tensor:2", 2, 1), ("tensor:8", 8, 4), ("data:2", 1, 1)])
def test_a_mesh_divides_all_but_the_norms_and_repeats_kv_heads(mesh: str, shards: int, repeats: int):
    definition = define("gqa", mesh)
    layers = 2 * ((HEADS + repeats * KV_HEADS + MLP) // shards + NORMS) + 64
    assert definition.shard_bytes == 4 * (layers + 2 * TABLE // shards)
    assert definition.step_shard_bytes == 4 * (layers + TABLE // shards)


def test_a_stage_reads_its_layers_and_the_head_for_each_microbatch():
    definition = define("gqa", "stage:2")  # each a layer, and half of the head
    assert definition.step_shard_bytes == 2 * 4 * (HEADS + KV_HEADS + MLP + NORMS + 64 + TABLE // 2)


def test_a_stage_reads_the_mlp_or_the_experts_of_a_slot_and_no_padding():
    config = llama.parse_config(HFConfig(llama.TINY_CONFIGS["gqa"]))
    moe = MoEConfig(num_experts=4, num_experts_per_token=4, mlp_dim=96, dense_layers=frozenset({0}))
    config = dataclasses.replace(config, num_layers=3, moe=moe)  # a dense layer, and two of experts
    definition = ModelDefinition.create(config, Partitioner.create("stage:2"), jnp.dtype("float32"))
    layers = 2 * (HEADS + KV_HEADS + 4 * MLP + 4 * 64 + NORMS)
    assert definition.step_shard_bytes == 2 * 4 * (layers + 64 + TABLE // 2)


@pytest.mark.parametrize(
    ("family", "mesh", "message"),
    [
        ("llama", "expert:2", "--mesh=expert:2: llama has no experts here; use data:2 or tensor:2"),
        ("llama", "stage:4", "--mesh=stage:4: the model has 2 layers; use at most that many stages"),
        ("bert", "stage:2", "--mesh=stage:2: bert is an encoder; use data and tensor"),
        ("bert", "data:2,context:4", "--mesh=context:4: bert is an encoder; use data and tensor"),
    ],
)
def test_an_axis_that_splits_nothing_is_refused(family: str, mesh: str, message: str):
    module = models.get(family)
    config = module.parse_config(HFConfig(next(iter(module.TINY_CONFIGS.values()))))
    with pytest.raises(ValueError, match=f"^{message}$"):
        ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype("float32"))
