"""The tokens of a step through the layers of the model, on however many stages these lie."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.attention import PagedAttention, Prompts, Rows, attention_specs
from jaxinfer.kv_cache import Cache
from jaxinfer.microbatches import Work, merge_tokens, num_microbatches, split, split_prompts, split_tokens
from jaxinfer.parameters import ModelDefinition
from jaxinfer.pipeline import Pipeline
from pallas_kernels import paged_attention
from sharding_rules import axes as ax

Arrays = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class StepLayers:
    """The layers, over weights as programs take them.

    Attributes:
      definition: the model.
      page_size: tokens per page.
      backend_name: of the attention.
      weights: of the trace.
    """

    definition: ModelDefinition
    page_size: int
    backend_name: str
    weights: Arrays

    @property
    def of_stages(self) -> Arrays:
        """Those of the weights that begin with the stages."""
        pairs = zip(self.definition.weights, self.weights, strict=True)
        return tuple(array for spec, array in pairs if spec.is_stacked)

    def pipeline(self, *, num_tokens: int = 0, num_rounds: int = 1) -> Pipeline:
        """For a step that prefills so many tokens of each data shard, if any, and decodes so many of each row."""
        partitioner = self.definition.partitioner
        return Pipeline(
            partitioner=partitioner,
            stage=self._run_stage,
            mask_work=Work.masked,
            num_microbatches=num_microbatches(partitioner.axis_size(ax.STAGE), num_tokens),
            num_rounds=num_rounds,
        )

    def run(
        self, cache: Cache, tokens: jax.Array, positions: jax.Array, rows: Rows | None, prompts: Prompts | None
    ) -> tuple[Cache, jax.Array]:
        """tokens, positions int32 [D, S], those of rows and then those of prompts -> activations [D, S, E], normalised.

        The cache is written in place.
        """
        model = self.definition.bind(self.weights)
        num_rows = 0 if rows is None else rows.positions.shape[1]
        num_tokens = tokens.shape[1] - num_rows
        pipeline = self.pipeline(num_tokens=num_tokens)
        parts = pipeline.num_microbatches
        works = Work(
            split_tokens(positions, num_rows, parts),
            jax.tree.map(lambda a: split(a, parts), rows),
            prompts and split_prompts(prompts, num_tokens, parts),
        )
        entering = split_tokens(model.embed(tokens, positions), num_rows, parts)

        def enter(_: jax.Array, item: Any) -> jax.Array:
            return lax.dynamic_index_in_dim(entering, item, keepdims=False)  # beyond the last: whatever, nobody looks

        def leave(hidden: jax.Array, item: Any, x: jax.Array) -> jax.Array:
            return lax.dynamic_update_index_in_dim(hidden, x, jnp.maximum(item, 0), axis=0)

        cache, hidden = pipeline.run(
            self.of_stages, cache, jnp.zeros_like(entering), enter=enter, work=lambda _: works, leave=leave
        )
        return cache, model.finish(merge_tokens(hidden, num_rows, num_tokens))

    def _run_stage(self, of_stage: Arrays, cache: Cache, x: jax.Array, work: Work) -> tuple[Cache, jax.Array]:
        own, pairs = iter(of_stage), zip(self.definition.weights, self.weights, strict=True)
        model = self.definition.bind(tuple(next(own) if spec.is_stacked else array for spec, array in pairs))
        specs = attention_specs(self.definition.decoder_config, self.definition.partitioner, self.page_size)
        backend = paged_attention.backend(self.backend_name, *(spec for of_slot in specs for spec in of_slot))
        attend = PagedAttention(
            cache, work.rows, work.prompts, specs=specs, backend=backend, partitioner=self.definition.partitioner
        )
        x = model.run_layers(x, work.positions, attend)
        return attend.cache, x
