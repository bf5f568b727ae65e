"""The pure functions that a step compiles from: (weights, cache, slots, batch) -> (cache, slots, output, activations).

Every array of a batch starts with the data shard, [D, ...]; the model sees the tokens of a shard in a row. A step of
one token also gives out what it drew from, for the full sampler to draw again: `full_sampler`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.attention import Prompts, Rows
from jaxinfer.batch import Array, ChunkArrays, StepBatch
from jaxinfer.kv_cache import Cache
from jaxinfer.logprobs import Logprobs
from jaxinfer.microbatches import Work, merge, split
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.sampling import SamplingArrays, sample
from jaxinfer.step_layers import Arrays, StepLayers
from pallas_kernels import matmul
from pallas_kernels.ragged import token_places
from sharding_rules import axes as ax

T = TypeVar("T")


class SlotState(NamedTuple):
    """What a row's next step needs of its last, so that the host need not know it yet."""

    tokens: Array  # int32 [D, slots]; the last token
    stopped: Array  # bool [D, slots]; whether it ended the sequence

    def put(self, slots: jax.Array, tokens: jax.Array, stopped: jax.Array) -> "SlotState":
        """Of rows, all [D, R]; a slot of -1 is nobody's. Written as a mask: a scatter would not stay in its shard."""
        hit = slots[..., None] == jnp.arange(self.tokens.shape[1])  # [D, R, slots]
        is_hit = jnp.any(hit, axis=1)
        new_tokens = jnp.sum(jnp.where(hit, tokens[..., None], 0), axis=1)
        new_stopped = jnp.any(hit & stopped[..., None], axis=1)
        return SlotState(jnp.where(is_hit, new_tokens, self.tokens), jnp.where(is_hit, new_stopped, self.stopped))


class StepOutput(NamedTuple):
    """Of each row: int32 `tokens` [D, R, num_steps], of which the first `counts` int32 [D, R] were generated."""

    tokens: Array
    counts: Array
    finite: Array  # bool [D, R]; whether all its logits were
    logprobs: Logprobs | None = None  # [D, R, ...]; of the tokens, from the full sampler
    prompt_logprobs: Logprobs | None = None  # [D, T, ...]; of the token after each of the chunks
    expert_counts: Array | None = None  # int32 [D, layers, E]; real tokens of each expert, of the layers that have some


class Activations(NamedTuple):
    """What a step of one token drew from."""

    logits: Array  # float32 [D, R, V]
    hidden: Array | None  # [D, T, E]; of the chunks if there are any, T the most tokens they may have, zeros after them


def activation_shardings(partitioner: Partitioner) -> Activations:
    """How steps leave them; those of a step without chunks have no `hidden`."""
    spec = partitioner.sharding
    return Activations(spec((ax.BATCH, None, ax.VOCAB)), spec((ax.BATCH, None, ax.EMBED)))


def is_stop(tokens: jax.Array, stop_token_ids: Array) -> jax.Array:
    """Whether each of tokens [D, R] is among the row's stop tokens [D, R, MAX_STOP_TOKEN_IDS]."""
    return jnp.any(tokens[..., None] == stop_token_ids, axis=-1)


class _Decoding(NamedTuple):
    """Rows on their way through `decode`, by microbatch; [m, D, r] each."""

    tokens: jax.Array  # int32; the last token of each
    positions: jax.Array  # int32; of that
    active: jax.Array  # bool
    finite: jax.Array  # bool
    counts: jax.Array  # int32; tokens generated
    out: jax.Array  # int32 [m, D, r, num_steps]; those


def _multiplied(step: Callable[..., T]) -> Callable[..., T]:
    """A method of `StepFunctions` whose products are those of the fastest way on its mesh."""

    @functools.wraps(step)
    def traced(self: "StepFunctions", *arguments: Any) -> T:
        with matmul.in_kernel(self.definition.partitioner.multiplies_in_kernel):
            return step(self, *arguments)

    return traced


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFunctions:
    """`one_token` and `decode`, for one model and one number of steps.

    A row whose logits are not finite generates nothing more and is reported; it never reaches another row.

    Attributes:
      definition: the model.
      page_size: tokens per page.
      cache_dtype: of a quantised cache.
      backend_name: of the attention.
      num_steps: tokens of each row.
      max_chunk: most tokens of a shard's chunks, to which `Activations.hidden` is padded.
      counts_experts: whether steps say how many tokens each expert got; only of a model with experts.
    """

    definition: ModelDefinition
    page_size: int
    cache_dtype: str | None
    backend_name: str
    num_steps: int
    max_chunk: int
    counts_experts: bool = False

    @property
    def settings(self) -> str:
        """Equal for functions that do the same with the same arguments."""
        others = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return repr(others | {"definition": self.definition.settings})

    @_multiplied
    def one_token(
        self, weights: Arrays, cache: Cache, slots: SlotState, batch: StepBatch
    ) -> tuple[Cache, SlotState, StepOutput, Activations]:
        """Caches each shard's chunks, if any, and decodes one token of the other rows. Donates `cache` and `slots`."""
        model, chunks = self.definition.bind(weights), batch.chunks
        num_rows = batch.slots.shape[1] - (0 if chunks is None else chunks.lengths.shape[1])  # the chunks' are behind
        last_tokens, stopped = self._last_tokens(slots, batch)
        active = ~stopped & (batch.num_remaining > 0)
        tokens, positions, prompts = last_tokens[:, :num_rows], batch.positions[:, :num_rows], None
        rows = Rows(*(x[:, :num_rows] for x in (batch.block_tables, batch.positions, active))) if num_rows else None
        if chunks is not None:
            active = jnp.concatenate([active[:, :num_rows], chunks.lengths > 0], axis=1)
            tokens = jnp.concatenate([tokens, chunks.tokens], axis=1)
            positions = jnp.concatenate([positions, _chunk_positions(chunks)], axis=1)
            prompts = Prompts(batch.block_tables[:, num_rows:], chunks.starts, chunks.lengths)
        layers = self._layers(weights)
        state, hidden = layers.run(layers.begin(cache, len(tokens)), tokens, positions, rows, prompts)
        drawn_from = hidden
        if chunks is not None:
            last = num_rows + jnp.maximum(jnp.cumsum(chunks.lengths, axis=1) - 1, 0)
            of_chunks = jnp.take_along_axis(hidden, last[..., None], axis=1)
            drawn_from = jnp.concatenate([hidden[:, :num_rows], of_chunks], axis=1)
        logits = model.logits(drawn_from)
        finite = jnp.all(jnp.isfinite(logits), axis=-1) | ~active
        new = self._sample(logits, batch.sampling, batch.positions + 1)
        counts = (active & finite & (batch.num_remaining > 0)).astype(jnp.int32)
        stopped = (counts == 0) | is_stop(new, batch.stop_token_ids) | (batch.num_remaining == 1)
        activations = Activations(logits, None if chunks is None else self._pad(hidden[:, num_rows:]))
        output = StepOutput(new[..., None], counts, finite, expert_counts=layers.expert_counts(state))
        return state.cache, slots.put(batch.slots, new, stopped), output, activations

    @_multiplied
    def decode(
        self, weights: Arrays, cache: Cache, slots: SlotState, batch: StepBatch
    ) -> tuple[Cache, SlotState, StepOutput, None]:
        """Generates up to `num_steps` tokens per row, stopping each row by itself. Donates `cache` and `slots`."""
        model, layers = self.definition.bind(weights), self._layers(weights)
        pipeline, num_rows = layers.pipeline(num_rounds=self.num_steps), batch.slots.shape[1]
        parts = pipeline.num_microbatches
        by_row = jax.tree.map(lambda a: a.reshape(batch.slots.shape) if a.ndim else a, batch.sampling)
        own = jax.tree.map(lambda a: split(a, parts) if a.ndim else a, batch._replace(sampling=by_row))
        tokens, stopped = (split(x, parts) for x in self._last_tokens(slots, batch))
        start = _Decoding(
            tokens=tokens,
            positions=own.positions,
            active=~stopped & (own.num_remaining > 0),
            finite=jnp.ones(tokens.shape, bool),
            counts=jnp.zeros(tokens.shape, jnp.int32),
            out=jnp.zeros((*tokens.shape, self.num_steps), jnp.int32),
        )

        def enter(state: _Decoding, item: Any) -> jax.Array:
            rows = _at(state, item % parts)
            return model.embed(rows.tokens, rows.positions)

        def work(state: _Decoding) -> Work:
            return Work(state.positions, Rows(own.block_tables, state.positions, state.active), None)

        def leave(state: _Decoding, item: Any, hidden: jax.Array) -> _Decoding:
            part = item % parts
            logits = model.logits(model.finish(hidden))  # [D, r, V]
            new = self._advance(_at(state, part), _at(own, part), logits, item // parts)
            return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, part, axis=0), state, new)

        begin = layers.begin(cache, len(batch.slots))
        of_stages, rows = pipeline.run(layers.of_stages, begin, start, enter=enter, work=work, leave=leave)
        end = jax.tree.map(lambda a: merge(a, num_rows), rows)
        output = StepOutput(end.out, end.counts, end.finite, expert_counts=layers.expert_counts(of_stages))
        return of_stages.cache, slots.put(batch.slots, end.tokens, ~end.active), output, None

    def _advance(self, rows: _Decoding, batch: StepBatch, logits: jax.Array, step: Any) -> _Decoding:
        """Rows [D, r] by a token, the one of `step`, where they go on; by none if that is negative."""
        is_turn = step >= 0
        is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
        active = rows.active & is_turn
        finite = rows.finite & (is_finite | ~active)
        active &= is_finite
        tokens = jnp.where(active, self._sample(logits, batch.sampling, rows.positions + 1), rows.tokens)
        counts = rows.counts + active.astype(jnp.int32)
        goes_on = active & ~is_stop(tokens, batch.stop_token_ids) & (counts < batch.num_remaining)
        return _Decoding(
            tokens=tokens,
            positions=rows.positions + active.astype(jnp.int32),
            active=jnp.where(is_turn, goes_on, rows.active),
            finite=finite,
            counts=counts,
            out=lax.dynamic_update_index_in_dim(rows.out, tokens, step, axis=2),
        )

    def _layers(self, weights: Arrays) -> StepLayers:
        return StepLayers(
            definition=self.definition,
            page_size=self.page_size,
            cache_dtype=self.cache_dtype,
            backend_name=self.backend_name,
            weights=weights,
            counts_experts=self.counts_experts,
        )

    def _pad(self, hidden: jax.Array) -> jax.Array:
        """To the most tokens of chunks, so that one program reads the activations of all."""
        return jnp.pad(hidden, ((0, 0), (0, self.max_chunk - hidden.shape[1]), (0, 0)))

    def _last_tokens(self, slots: SlotState, batch: StepBatch) -> tuple[jax.Array, jax.Array]:
        """Of each row, its last token and whether that ended it. [D, R] each."""
        index = jnp.maximum(batch.slots, 0)
        tokens, stopped = (jnp.take_along_axis(x, index, axis=1, mode="clip") for x in slots)
        return tokens, stopped

    def _sample(self, logits: jax.Array, sampling: SamplingArrays, positions: jax.Array) -> jax.Array:
        """[D, R, V] -> [D, R]."""
        flat, params = logits.reshape(-1, logits.shape[-1]), jax.tree.map(jnp.ravel, sampling)
        params = params._replace(draws=sampling.draws, truncates=sampling.truncates)
        partitioner = self.definition.partitioner
        kernel = partitioner.draw_kernel
        tokens = sample(flat, params, positions.reshape(-1), partitioner.in_each_shard, kernel=kernel)
        return tokens.reshape(positions.shape)


def _at(tree: T, part: Any) -> T:
    """One part of arrays that begin with the parts."""
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, part, keepdims=False) if a.ndim else a, tree)


def _chunk_positions(chunks: ChunkArrays) -> jax.Array:
    """int32 [D, T]; of the chunks' tokens."""
    place = jax.vmap(functools.partial(token_places, num_tokens=chunks.tokens.shape[1]))(chunks.lengths)
    return jnp.take_along_axis(chunks.starts, place.sequence, axis=1) + place.offset
