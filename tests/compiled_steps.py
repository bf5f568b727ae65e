"""What XLA made of a step on a mesh: its collectives, and whether the cache stays in place."""

import dataclasses
import functools
import math
import re

import jax.numpy as jnp

from jaxinfer import kv_cache
from jaxinfer.batch import StepShape
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.planning import hlo
from tests.parity import driver, recipe

CONFIG = recipe.tiny_config("llama", "gqa")
SHAPES = driver.Shapes(rows=4, max_len=128, chunk=64, num_steps=4)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled decode step.

    Attributes:
      collectives: (operation, elements of its result on one device) of each.
      cache_copies: instructions that copy a whole cache array.
      alias_bytes, cache_bytes: of one device.
      activation_size: elements of one device's rows of activations, [B, 1, D].
    """

    collectives: list[tuple[str, int]]
    cache_copies: list[str]
    alias_bytes: int
    cache_bytes: int
    activation_size: int
    logits_size: int
    logits_stay_in_branch: bool

    @property
    def large(self) -> list[tuple[str, int]]:
        """Collectives of activations, or of anything larger: logits, weights, pages."""
        return [(op, size) for op, size in self.collectives if size >= self.activation_size]


@functools.cache
def compile_step(
    num_layers: int, mesh: str, unsplit: str | None = None, chunk_tokens: int = 0, num_steps: int = SHAPES.num_steps
) -> Step:
    """`unsplit` is a logical axis that is left whole, against the mesh's strategy."""
    config = llama.parse_config(HFConfig(CONFIG | {"num_hidden_layers": num_layers}))
    partitioner = Partitioner.create(mesh)
    if unsplit is not None:
        rules = dataclasses.replace(partitioner.rules, rules={**partitioner.rules.rules, unsplit: ()})
        partitioner = dataclasses.replace(partitioner, rules=rules)
    definition = ModelDefinition.create(config, partitioner, jnp.dtype("float32"))
    programs = driver.step_programs(definition, SHAPES)
    buckets = SHAPES.buckets()
    chunks, num_steps = (buckets.num_chunks, 1) if chunk_tokens else (0, num_steps)
    compiled = programs.lowered(StepShape(chunk_tokens, chunks, SHAPES.rows, buckets.pages[0], num_steps)).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    spec = driver.cache_spec(definition, SHAPES)
    page_shape = kv_cache.cache_sharding(spec, partitioner).shard_shape(spec.shape)
    shape_text = ",".join(map(str, page_shape))
    return Step(
        collectives=collectives(text),
        cache_copies=re.findall(rf"f32\[{shape_text}\]\S* copy\(.*", text),
        alias_bytes=memory.alias_size_in_bytes,
        cache_bytes=2 * config.num_layers * math.prod(page_shape) * spec.dtype.itemsize,  # 2: keys and values
        activation_size=SHAPES.rows * config.embed_dim,
        logits_size=SHAPES.rows * config.vocab_size,
        logits_stay_in_branch=all(
            collective.is_in_branch
            for collective in hlo.collectives(text)
            if collective.op == "all-gather" and collective.num_elements == SHAPES.rows * config.vocab_size
        ),
    )


def collectives(text: str) -> list[tuple[str, int]]:
    """(operation, elements of its result on one device) of each."""
    return [(collective.op, collective.num_elements) for collective in hlo.collectives(text)]
