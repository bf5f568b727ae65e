"""The tokens of a step through the layers of the model, on however many stages these lie."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.attention import PagedAttention, Prompts, Rows, attention_specs
from jaxinfer.kv_cache import Cache
from jaxinfer.layers.moe import Routing
from jaxinfer.microbatches import Work, merge_tokens, split, split_prompts, split_tokens
from jaxinfer.parameters import ModelDefinition
from jaxinfer.pipeline import Pipeline
from jaxinfer.stages import StagePlan, num_microbatches
from pallas_kernels import paged_attention
from sharding_rules import axes as ax

Arrays = tuple[jax.Array, ...]


class StageState(NamedTuple):
    """What stages keep from one microbatch to the next."""

    cache: Cache
    expert_counts: jax.Array | None  # int32 [stages * D, slots for layers, E]; None: nobody counts


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepLayers:
    """The layers, over weights as programs take them.

    Attributes:
      definition: the model.
      page_size: tokens per page.
      cache_dtype: of a quantised cache.
      backend_name: of the attention.
      weights: of the trace.
      counts_experts: whether it is counted how many tokens each expert gets; only of a model with experts.
    """

    definition: ModelDefinition
    page_size: int
    cache_dtype: str | None
    backend_name: str
    weights: Arrays
    counts_experts: bool

    def begin(self, cache: Cache, num_shards: int) -> StageState:
        """Nothing counted yet."""
        config, plan = self.definition.decoder_config, self._plan
        if config.moe is None or not self.counts_experts:
            return StageState(cache, None)
        size = (plan.num_stages * num_shards, len(plan.slots), config.moe.num_experts)
        return StageState(cache, jnp.zeros(size, jnp.int32))

    def expert_counts(self, state: StageState) -> jax.Array | None:
        """int32 [D, layers, E], of the layers with experts."""
        counts = state.expert_counts
        if counts is None:
            return None
        by_stage = counts.reshape(self._plan.num_stages, -1, *counts.shape[1:])
        layers = self.definition.decoder_config.expert_layers
        return jnp.stack([by_stage[stage, :, slot] for stage, slot in map(self._plan.place_of, layers)], axis=1)

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
            num_microbatches=num_microbatches(partitioner.axis_size(ax.STAGE), num_tokens, partitioner.platform),
            num_rounds=num_rounds,
        )

    def run(
        self, state: StageState, tokens: jax.Array, positions: jax.Array, rows: Rows | None, prompts: Prompts | None
    ) -> tuple[StageState, jax.Array]:
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

        state, hidden = pipeline.run(
            self.of_stages, state, jnp.zeros_like(entering), enter=enter, work=lambda _: works, leave=leave
        )
        return state, model.finish(merge_tokens(hidden, num_rows, num_tokens))

    @property
    def _plan(self) -> StagePlan:
        partitioner = self.definition.partitioner
        return StagePlan.create(self.definition.config.num_layers, partitioner.axis_size(ax.STAGE))

    def _run_stage(self, of_stage: Arrays, state: StageState, x: jax.Array, work: Work) -> tuple[StageState, jax.Array]:
        own, pairs = iter(of_stage), zip(self.definition.weights, self.weights, strict=True)
        model = self.definition.bind(tuple(next(own) if spec.is_stacked else array for spec, array in pairs))
        model_config, partitioner = self.definition.decoder_config, self.definition.partitioner
        specs = attention_specs(model_config, partitioner, self.page_size, self.cache_dtype)
        backend = paged_attention.backend(self.backend_name, *(spec for of_slot in specs for spec in of_slot))
        attend = PagedAttention(
            state.cache, work.rows, work.prompts, specs=specs, backend=backend, partitioner=partitioner
        )
        if (moe := model_config.moe) is None:
            x = model.run_layers(x, work.positions, attend)
            return StageState(attend.cache, None), x
        routing, counts = Routing(work.is_valid, moe.num_experts), state.expert_counts
        x = model.run_layers(x, work.positions, attend, routing)
        if counts is not None:
            counts += jnp.stack([routing.counts(slot) for slot in range(counts.shape[1])], axis=1)
        return StageState(attend.cache, counts), x
