"""The programs of `full_sampler`, lowered from shapes alone: nothing is allocated.

A handful of programs whatever shapes the steps have: one that writes a slot of each shard, one that draws per number
of rows, one that scores prompts.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer import extras
from jaxinfer.batch import StepBatch
from jaxinfer.extras import ExtrasSpec, FullRows, Score, SlotLoad, SlotParams
from jaxinfer.full_sampler import FullSampler
from jaxinfer.logprobs import Logprobs
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.programs import Program
from jaxinfer.steps import SlotState, StepOutput, activation_shardings
from sharding_rules import axes as ax

LOAD, SCORE = "load", "score"
Key = str | int  # an int: the program that draws for so many rows per shard


@dataclasses.dataclass(frozen=True)
class SamplerLowerings:
    """What to compile for the extras of steps.

    Attributes:
      spec: sizes of the arrays.
    """

    definition: ModelDefinition
    spec: ExtrasSpec

    @functools.cached_property
    def params(self) -> SlotParams:
        """Of all slots; abstract."""
        in_slots = lambda a: self._rows((self._num_shards, self.spec.num_slots, *a.shape[1:]), a.dtype)  # noqa: E731
        return jax.tree.map(in_slots, self._empty_load.params)

    def all(self, batches: list[StepBatch], weights: Any) -> dict[Key, Program]:
        """For steps of one token with such batches; all abstract."""
        by_rows: dict[Key, StepBatch] = {batch.slots.shape[1]: batch for batch in batches}
        draws = {rows: self.sample(batch) for rows, batch in by_rows.items()}
        return draws | {LOAD: self.load(), SCORE: self.score(weights)}

    def allocation(self) -> Program:
        """Of empty parameters for all slots."""
        make = lambda: jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), self.params)  # noqa: E731
        return self._program("slots", make, (), _shardings(self.params))

    def load(self) -> Program:
        load = jax.tree.map(lambda a: self._rows(a.shape, a.dtype), self._empty_load)
        return self._program(LOAD, self._functions.load, (self.params, load), _shardings(self.params), donated=(0,))

    def sample(self, batch: StepBatch) -> Program:
        """For the rows of an abstract batch."""
        batch = without_tokens(batch)
        num_shards, num_rows = batch.slots.shape
        slots = SlotState(*(self._rows((num_shards, self.spec.num_slots), dtype) for dtype in (jnp.int32, jnp.bool_)))
        output = StepOutput(
            tokens=self._replicated((num_shards, num_rows, 1), jnp.int32),
            counts=self._replicated((num_shards, num_rows), jnp.int32),
            finite=self._replicated((num_shards, num_rows), jnp.bool_),
        )
        flag = self._rows((), jnp.bool_)
        rows = FullRows(self._rows((num_shards, num_rows), jnp.bool_), wants_logprobs=flag, draws=flag)
        replicated = self._partitioner.replicated  # so that every host can read the output
        shardings = (
            *_shardings((slots, self.params)),
            StepOutput(replicated, replicated, replicated, logprobs=Logprobs(*[replicated] * 4)),
        )
        arguments = slots, self.params, self.logits(batch), output, batch, rows
        return self._program("sample", self._functions.sample, arguments, shardings, donated=(0, 1))

    def logits(self, batch: StepBatch) -> jax.ShapeDtypeStruct:
        """That a step gives out for the rows of a batch."""
        shape = (*batch.slots.shape, self.spec.vocab_size)
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=activation_shardings(self._partitioner).logits)

    def score(self, weights: Any) -> Program:
        """Over abstract weights."""
        num_tokens = self.spec.max_chunk
        shape = (self._num_shards, num_tokens, self.definition.config.embed_dim)
        dtype = self.definition.params[0].dtype
        hidden = jax.ShapeDtypeStruct(shape, dtype, sharding=activation_shardings(self._partitioner).hidden)
        score = Score(self._rows((self._num_shards, num_tokens), jnp.int32), self._rows((), jnp.int32))
        outputs = Logprobs(*[self._partitioner.replicated] * 4)
        return self._program(SCORE, self._functions.score, (weights, hidden, score), outputs)

    def _program(
        self,
        name: str,
        function: Callable[..., Any],
        arguments: tuple[Any, ...],
        outputs: Any,
        donated: tuple[int, ...] = (),
    ) -> Program:
        return Program(
            name=name,
            settings=repr((self.definition.settings, self.spec)),
            function=function,
            arguments=arguments,
            outputs=outputs,
            donated=donated,
        )

    @property
    def _partitioner(self) -> Partitioner:
        return self.definition.partitioner

    @property
    def _functions(self) -> FullSampler:
        return FullSampler(self.definition)

    @property
    def _num_shards(self) -> int:
        return self._partitioner.num_shards(ax.BATCH)

    @property
    def _empty_load(self) -> SlotLoad:
        return extras.slot_load([None] * self._num_shards, self.spec)

    def _rows(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._partitioner.row_sharding(shape))

    def _replicated(self, shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=self._partitioner.replicated)


def without_tokens(batch: StepBatch) -> StepBatch:
    """Without what the model read, so that one program serves all steps of as many rows."""
    return batch._replace(block_tables=None, chunks=None)


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.sharding, tree)
