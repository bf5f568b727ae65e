"""What XLA makes of a decode loop of any family on any mesh: what travels for a token, and what does not."""

import functools
import math
import re

import jax.numpy as jnp
import pytest

from jaxinfer import kv_cache, models
from jaxinfer.attention import attention_specs
from jaxinfer.batch import StepShape
from jaxinfer.hf_config import HFConfig
from jaxinfer.integers import cdiv
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.stages import StagePlan
from sharding_rules import axes as ax
from tests.compiled_steps import collectives
from tests.long_campaign import chosen
from tests.parity import driver, recipe

SHAPES = driver.Shapes(rows=8, max_len=64, chunk=32, num_steps=4)
MESHES = ("data:2", "tensor:2", "stage:2", "context:2", "stage:2,tensor:2", "context:2,tensor:2", "data:2,stage:2")
EXPERT_MESHES = ("expert:2", "expert:8", "data:2,expert:4", "expert:4,tensor:2", "stage:2,expert:2,tensor:2")
WITH_EXPERTS = ("deepseek", "gpt_oss", "mixtral", "qwen3_moe")
CASES = chosen(
    [
        *((family, mesh, "inference") for family in models.decoders() for mesh in MESHES),
        *((f, mesh, rules) for f in WITH_EXPERTS for mesh in EXPERT_MESHES for rules in ("inference", "expert_sums")),
    ],
    ("llama", "stage:2,tensor:2", "inference"),
    ("gemma3", "stage:2", "inference"),
    ("deepseek", "expert:8", "inference"),
    ("mixtral", "expert:4,tensor:2", "inference"),
    ("mixtral", "expert:4,tensor:2", "expert_sums"),
)


@functools.cache
def compile_decode(family: str, mesh: str, sharding: str) -> tuple[ModelDefinition, str, int]:
    """Its loop, with the bytes that it takes over from what it is given."""
    config = models.get(family).parse_config(HFConfig(recipe.first_config(family)))
    definition = ModelDefinition.create(config, Partitioner.create(mesh, sharding), jnp.dtype("float32"))
    programs = driver.step_programs(definition, SHAPES)
    compiled = programs.lowered(StepShape(0, 0, SHAPES.rows, SHAPES.buckets().pages[0], SHAPES.num_steps)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None
    return definition, hlo, memory.alias_size_in_bytes


def expected(definition: ModelDefinition) -> list[tuple[str, int]]:
    """(operation, elements of its result on one device) of what travels for a token of each of a device's rows.

    For R rows of D numbers, of which a pipeline takes R / stages a tick: behind attention and behind the MLP an
    all-reduce of R * D each, where heads and hidden units are split; of the merge over `context` R * N and then
    R * N * (H + 1), of N heads on a device; of experts the rows' way there and back, R * k * D each, where tokens are
    split, else their sum, R * D. Outside of the layers a sum for embedded tokens, and logits, in a branch, where the
    vocabulary is split. With stages a permutation of R * D, and a sum of what left the last stage, R * D.
    """
    config, partitioner = definition.decoder_config, definition.partitioner
    num_stages = partitioner.axis_size(ax.STAGE)
    rows = cdiv(SHAPES.rows, num_stages)
    sums = ("all-reduce", rows * config.embed_dim)
    is_split = {axis: partitioner.num_shards(axis) > 1 for axis in (ax.HEADS, ax.MLP, ax.EXPERT_MLP, ax.VOCAB)}
    found = [sums, ("all-gather", rows * config.vocab_size)] * is_split[ax.VOCAB]
    found += [sums, ("collective-permute", rows * config.embed_dim)] * (num_stages > 1)
    plan = StagePlan.create(config.num_layers, num_stages)
    for slot, specs in enumerate(attention_specs(config, partitioner, SHAPES.page_size)):
        for spec in set(specs):  # of stages that differ each in a branch
            of_heads = rows * spec.num_q_heads
            found += [("all-reduce", n * of_heads) for n in (1, spec.out_dim + 1)] * (spec.context_size > 1)
        found += [sums] * is_split[ax.HEADS]
        for has_experts in set(map(config.has_experts, plan.like(slot))):
            found += _of_mlp(definition, has_experts, sums, is_split)
    return sorted(found)


def _of_mlp(
    definition: ModelDefinition, has_experts: bool, sums: tuple[str, int], is_split: dict[str, bool]
) -> list[tuple[str, int]]:
    if not has_experts:
        return [sums] * is_split[ax.MLP]
    moe, partitioner = definition.decoder_config.moe, definition.partitioner
    assert moe is not None
    is_exchanged = ax.EXPERT in partitioner.mesh_axes(ax.BATCH)
    found = [("all-to-all", moe.num_experts_per_token * sums[1])] * 2 * is_exchanged
    found += [sums] * (is_split[ax.EXPERT_MLP] or (partitioner.num_shards(ax.EXPERTS) > 1 and not is_exchanged))
    return found + [sums] * (is_split[ax.MLP] and moe.shared_mlp_dim > 0)


@pytest.mark.parametrize(("family", "mesh", "sharding"), CASES)
def test_what_travels_for_a_token(family: str, mesh: str, sharding: str):
    """And so no weight and no page, which are larger, do. What is smaller than a row's activations is not looked at."""
    definition, hlo, _ = compile_decode(family, mesh, sharding)
    rows = cdiv(SHAPES.rows, definition.partitioner.axis_size(ax.STAGE))
    least = rows * definition.config.embed_dim
    wanted = [(op, size) for op, size in expected(definition) if size >= least]
    assert sorted((op, size) for op, size in collectives(hlo) if size >= least) == wanted


@pytest.mark.parametrize(("family", "mesh", "sharding"), CASES)
def test_cache_is_written_in_place(family: str, mesh: str, sharding: str):
    definition, hlo, alias_bytes = compile_decode(family, mesh, sharding)
    spec = driver.cache_spec(definition, SHAPES)
    shard_shape = kv_cache.cache_sharding(spec, definition.partitioner).shard_shape(spec.shape)
    num_arrays = spec.num_slots * (2 if spec.has_values else 1)
    slot_bytes = SHAPES.rows * (4 + 1)  # a token and a flag each
    assert alias_bytes == num_arrays * math.prod(shard_shape) * spec.dtype.itemsize + slot_bytes
    for shape in (shard_shape, shard_shape[-4:]):
        assert not re.findall(rf"f32\[{','.join(map(str, shape))}\]\S* copy\(.*", hlo)
