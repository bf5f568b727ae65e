"""The program of each shape of a step, lowered from shapes alone: no weights, no cache, nothing allocated."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import batch, kv_cache
from jaxinfer.batch import Buckets, StepBatch, StepShape
from jaxinfer.extras import ExtrasSpec
from jaxinfer.kv_cache import Cache, CacheSpec
from jaxinfer.parameters import ModelDefinition
from jaxinfer.programs import Program
from jaxinfer.sampler_lowerings import SamplerLowerings
from jaxinfer.steps import SlotState, StepFunctions, StepOutput, activation_shardings
from sharding_rules import axes as ax


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepPrograms:
    """What to compile for a model on its mesh.

    Attributes:
      definition: the model.
      cache_spec: over the whole mesh.
      buckets: every shape of a step.
      backend: of the attention.
      counts_experts: whether steps say how many tokens each expert got; only of a model with experts.
    """

    definition: ModelDefinition
    cache_spec: CacheSpec
    buckets: Buckets
    backend: str
    counts_experts: bool = False

    @property
    def extras_spec(self) -> ExtrasSpec:
        """The sizes of what a step may be given beyond its batch."""
        return ExtrasSpec.create(self.buckets, self.definition.config.vocab_size)

    @property
    def sampler(self) -> SamplerLowerings:
        """What follows steps with extras."""
        return SamplerLowerings(self.definition, self.extras_spec)

    @property
    def slot_shape(self) -> tuple[int, int]:
        """Of the arrays of `SlotState`."""
        return self.definition.partitioner.num_shards(ax.BATCH), self.buckets.rows[-1]

    def lowered(self, shape: StepShape) -> jax.stages.Lowered:
        """The program of a shape, traced."""
        return self.program(shape).lower()

    def program(self, shape: StepShape) -> Program:
        """The program of a shape."""
        spec, partitioner = self.cache_spec, self.definition.partitioner
        functions = StepFunctions(
            definition=self.definition,
            page_size=spec.page_size,
            cache_dtype=spec.quantized_dtype,
            backend_name=self.backend,
            num_steps=shape.num_steps,
            max_chunk=self.extras_spec.max_chunk,
            counts_experts=self.counts_experts,
        )
        arguments = self.arguments(shape)
        replicated = partitioner.replicated  # so that every host can read the output
        expert_counts = replicated if self.counts_experts else None
        output = StepOutput(replicated, replicated, replicated, expert_counts=expert_counts)
        activations = activation_shardings(partitioner) if shape.num_steps == 1 else None
        if activations and not shape.chunk_tokens:
            activations = activations._replace(hidden=None)
        return Program(
            name="one token" if shape.num_steps == 1 else "decode",
            settings=functions.settings,
            function=functions.one_token if shape.num_steps == 1 else functions.decode,
            arguments=arguments,
            outputs=(*jax.tree.map(lambda a: a.sharding, arguments[1:3]), output, activations),
            donated=(1, 2),
        )

    def arguments(self, shape: StepShape) -> tuple[tuple[jax.ShapeDtypeStruct, ...], Cache, SlotState, StepBatch]:
        """The shapes, dtypes and shardings of what a program takes: weights, cache, slots, batch."""
        spec, partitioner = self.cache_spec, self.definition.partitioner
        cache = spec.layers(lambda: kv_cache.abstract_pages(spec, partitioner))
        slots = SlotState(self._array(jnp.int32, *self.slot_shape), self._array(jnp.bool_, *self.slot_shape))
        return self.definition.abstract_arrays, cache, slots, self.batch(shape)

    def batch(self, shape: StepShape) -> StepBatch:
        """The shapes and dtypes of any batch of this shape: those of an empty one."""
        return jax.tree.map(lambda a: self._array(a.dtype, *a.shape), batch.empty(shape, self.buckets))

    def _array(self, dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self.definition.partitioner.row_sharding(shape))
