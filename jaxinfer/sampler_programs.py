"""Owns the parameters that requests have in their slots on the devices, and the programs of `full_sampler`.

A handful of programs whatever shapes the steps have: one that writes a slot of each shard, one that draws per number
of rows, one that scores prompts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import extras
from jaxinfer.batch import StepBatch
from jaxinfer.extras import Extras, ExtrasSpec, FullRows, Score
from jaxinfer.full_sampler import FullSampler
from jaxinfer.logprobs import Logprobs
from jaxinfer.parameters import ModelDefinition
from jaxinfer.steps import Activations, Arrays, SlotState, StepOutput, activation_shardings
from sharding_rules import axes as ax

_LOAD, _SCORE = "load", "score"
Key = str | int  # an int: the program that draws for so many rows per shard


class SamplerPrograms:
    """Does the extras of steps over slot parameters that it holds.

    Attributes:
      spec: sizes of the arrays.
    """

    def __init__(self, definition: ModelDefinition, spec: ExtrasSpec):
        self.spec = spec
        self._definition = definition
        self._partitioner = definition.partitioner
        self._functions = FullSampler(definition)
        self._num_shards = self._partitioner.num_shards(ax.BATCH)
        self._empty_load = extras.slot_load([None] * self._num_shards, spec)
        in_slots = lambda a: self._rows((self._num_shards, spec.num_slots, *a.shape[1:]), a.dtype)  # noqa: E731
        self._abstract = jax.tree.map(in_slots, self._empty_load.params)
        make = jax.jit(
            lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self._abstract),
            out_shardings=self._shardings(self._abstract),
        )
        self._allocate = make.lower().compile()
        self._params = self._allocate()
        self._programs: dict[Key, jax.stages.Compiled] = {}

    def lowerings(self, batches: list[StepBatch], weights: Any) -> dict[Key, Callable[[], jax.stages.Lowered]]:
        """What to compile, and `add`, for steps of one token with such batches; all abstract."""
        batches = [batch._replace(block_tables=None, chunks=None) for batch in batches]
        by_rows: dict[Key, StepBatch] = {batch.slots.shape[1]: batch for batch in batches}
        draws = {rows: lambda batch=batch: self.lowered_sample(batch) for rows, batch in by_rows.items()}
        return draws | {_LOAD: self.lowered_load, _SCORE: lambda: self.lowered_score(weights)}

    def add(self, key: Key, program: jax.stages.Compiled) -> None:
        self._programs[key] = program

    def run(
        self,
        slots: SlotState,
        weights: Arrays,
        activations: Activations,
        output: StepOutput,
        batch: StepBatch,
        extras: Extras,
    ) -> tuple[SlotState, StepOutput]:
        """Does a step's extras behind it; donates `slots`. The batch's and the extras' arrays are on the devices."""
        for load in extras.loads:
            self._params = self._programs[_LOAD](self._params, load)
        if extras.rows is not None:
            batch = batch._replace(block_tables=None, chunks=None)
            sample = self._programs[batch.slots.shape[1]]
            expert_counts, output = output.expert_counts, output._replace(expert_counts=None)
            slots, self._params, output = sample(slots, self._params, activations.logits, output, batch, extras.rows)
            output = output._replace(expert_counts=expert_counts)
        if extras.score is not None:
            scores = self._programs[_SCORE](weights, activations.hidden, extras.score)
            output = output._replace(prompt_logprobs=scores)
        return slots, output

    def reset(self) -> None:
        """Makes new parameters after a step that failed, and may have taken the donated ones with it."""
        self.close()
        self._params = self._allocate()

    def close(self) -> None:
        """Frees the device memory."""
        for array in jax.tree.leaves(self._params):
            array.delete()

    def lowered_load(self) -> jax.stages.Lowered:
        jitted = jax.jit(self._functions.load, donate_argnums=0, out_shardings=self._shardings(self._abstract))
        load = jax.tree.map(lambda a: self._rows(a.shape, a.dtype), self._empty_load)
        return jitted.lower(self._abstract, load)

    def lowered_sample(self, batch: StepBatch) -> jax.stages.Lowered:
        """For the rows of an abstract batch, which has no block tables and no chunks."""
        num_shards, num_rows = batch.slots.shape
        slots = SlotState(*(self._rows((num_shards, self.spec.num_slots), dtype) for dtype in (jnp.int32, jnp.bool_)))
        output = StepOutput(
            tokens=self._replicated((num_shards, num_rows, 1), jnp.int32),
            counts=self._replicated((num_shards, num_rows), jnp.int32),
            finite=self._replicated((num_shards, num_rows), jnp.bool_),
        )
        shape = (num_shards, num_rows, self.spec.vocab_size)
        logits = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=activation_shardings(self._partitioner).logits)
        flag = self._rows((), jnp.bool_)
        rows = FullRows(self._rows((num_shards, num_rows), jnp.bool_), wants_logprobs=flag, draws=flag)
        replicated = self._partitioner.replicated  # so that every host can read the output
        shardings = (
            *self._shardings((slots, self._abstract)),
            StepOutput(replicated, replicated, replicated, logprobs=Logprobs(*[replicated] * 4)),
        )
        jitted = jax.jit(self._functions.sample, donate_argnums=(0, 1), out_shardings=shardings)
        return jitted.lower(slots, self._abstract, logits, output, batch, rows)

    def lowered_score(self, weights: Any) -> jax.stages.Lowered:
        """Over abstract weights."""
        num_tokens = self.spec.max_chunk
        shape = (self._num_shards, num_tokens, self._definition.config.embed_dim)
        dtype = self._definition.params[0].dtype
        hidden = jax.ShapeDtypeStruct(shape, dtype, sharding=activation_shardings(self._partitioner).hidden)
        score = Score(self._rows((self._num_shards, num_tokens), jnp.int32), self._rows((), jnp.int32))
        jitted = jax.jit(self._functions.score, out_shardings=Logprobs(*[self._partitioner.replicated] * 4))
        return jitted.lower(weights, hidden, score)

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._partitioner.row_sharding(shape))

    def _replicated(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._partitioner.replicated)

    def _shardings(self, tree: Any) -> Any:
        return jax.tree.map(lambda a: a.sharding, tree)
