"""What XLA makes of a decode step of a mixture whose experts are on several devices: what travels and what does not."""

import functools
import math
import re

import jax.numpy as jnp
import pytest

from jaxinfer import kv_cache, models
from jaxinfer.batch import StepShape
from jaxinfer.hf_config import HFConfig
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax
from tests.compiled_steps import COLLECTIVE, num_elements
from tests.long_campaign import chosen
from tests.parity import driver, recipe

SHAPES = driver.Shapes(rows=8, max_len=64, chunk=32, num_steps=4)
CASES = chosen(
    [
        (family, mesh, sharding)
        for family in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek")
        for mesh in ("expert:2", "expert:8", "data:2,expert:4", "expert:4,tensor:2")
        for sharding in ("inference", "expert_sums")
    ],
    ("deepseek", "expert:8", "inference"),
    ("mixtral", "expert:4,tensor:2", "inference"),
    ("mixtral", "expert:4,tensor:2", "expert_sums"),
)


@functools.cache
def compile_step(family: str, mesh: str, sharding: str) -> tuple[ModelDefinition, str, int]:
    """Of one token, with the bytes that it takes over from what it is given."""
    config = models.get(family).parse_config(HFConfig(recipe.first_config(family)))
    definition = ModelDefinition.create(config, Partitioner.create(mesh, sharding), jnp.dtype("float32"))
    programs = driver.step_programs(definition, SHAPES)
    compiled = programs.lowered(StepShape(0, 0, SHAPES.rows, SHAPES.buckets().pages[0], 1)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None
    return definition, hlo, memory.alias_size_in_bytes


def large_collectives(definition: ModelDefinition, hlo: str) -> list[tuple[str, int]]:
    """Operation and elements of its result on one device, of those that are no less than a shard's activations."""
    found = [(op, num_elements(result)) for result, op in COLLECTIVE.findall(hlo)]
    return sorted((op, size) for op, size in found if size >= SHAPES.rows * definition.config.embed_dim)


@pytest.mark.parametrize(("family", "mesh", "sharding"), CASES)
def test_what_travels_in_a_decode_step(family: str, mesh: str, sharding: str):
    """Rows to their experts and back, a row for each expert of each token: B * k * D numbers each.

    Two of them a layer with experts, in the body of the loop over rounds; or, by sums, one all-reduce of B * D. Beside
    that, where heads and hidden units are split, what a dense model has: an all-reduce behind attention, one behind
    an MLP or the experts that every token goes through, and one for embedded tokens; and logits in a branch. No weight
    and no page travels.
    """
    definition, hlo, _ = compile_step(family, mesh, sharding)
    config, partitioner = definition.decoder_config, definition.partitioner
    assert config.moe is not None
    num_sparse, num_layers = len(config.expert_layers), config.num_layers
    activation = SHAPES.rows * config.embed_dim
    is_split = lambda axis: partitioner.num_shards(axis) > 1  # noqa: E731
    sums = num_layers * is_split(ax.HEADS) + (num_layers - num_sparse) * is_split(ax.MLP) + is_split(ax.VOCAB)
    sums += num_sparse * (is_split(ax.EXPERT_MLP) or sharding == "expert_sums")
    sums += num_sparse * (is_split(ax.MLP) and config.moe.shared_mlp_dim > 0)
    expected = [("all-reduce", activation)] * sums
    expected += [("all-gather", SHAPES.rows * config.vocab_size)] * is_split(ax.VOCAB)
    if sharding == "inference":
        expected += [("all-to-all", config.moe.num_experts_per_token * activation)] * 2 * num_sparse
    assert large_collectives(definition, hlo) == sorted(expected)


@pytest.mark.parametrize(("family", "mesh", "sharding"), CASES)
def test_cache_is_written_in_place(family: str, mesh: str, sharding: str):
    definition, hlo, alias_bytes = compile_step(family, mesh, sharding)
    spec = driver.cache_spec(definition, SHAPES)
    page_shape = kv_cache.cache_sharding(spec, definition.partitioner).shard_shape(spec.shape)
    num_arrays = spec.num_slots * (2 if spec.has_values else 1)
    slot_bytes = SHAPES.rows * (4 + 1)  # a token and a flag each
    assert alias_bytes == num_arrays * math.prod(page_shape) * spec.dtype.itemsize + slot_bytes
    assert not re.findall(rf"f32\[{','.join(map(str, page_shape))}\]\S* copy\(.*", hlo)
