"""The pure functions that a step compiles from: (weights, cache, slots, batch) -> (cache, slots, output, activations).

Every array of a batch starts with the data shard, [D, ...]; the model sees the tokens of a shard in a row. A step of
one token also gives out what it drew from, for the full sampler to draw again: `full_sampler`.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.attention import PagedAttention, Prompts, Rows, attention_specs
from jaxinfer.batch import Array, StepBatch
from jaxinfer.kv_cache import Cache
from jaxinfer.logprobs import Logprobs
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.sampling import SamplingArrays, sample
from pallas_kernels import paged_attention
from pallas_kernels.ragged import token_places
from sharding_rules import axes as ax

Arrays = tuple[jax.Array, ...]


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFunctions:
    """`decode` and `prefill`, for one model and one number of steps.

    A row whose logits are not finite generates nothing more and is reported; it never reaches another row.

    Attributes:
      definition: the model.
      page_size: tokens per page.
      backend_name: of the attention.
      num_steps: tokens of each row.
      max_chunk: most tokens of a shard's chunks, to which `Activations.hidden` is padded.
    """

    definition: ModelDefinition
    page_size: int
    backend_name: str
    num_steps: int
    max_chunk: int

    def decode(
        self, weights: Arrays, cache: Cache, slots: SlotState, batch: StepBatch
    ) -> tuple[Cache, SlotState, StepOutput, Activations | None]:
        """Generates up to `num_steps` tokens per row, stopping each row by itself. Donates `cache` and `slots`."""
        model = self.definition.bind(weights)
        tokens, stopped = self._last_tokens(slots, batch)
        active = ~stopped & (batch.num_remaining > 0)

        def step(i: jax.Array | int, state):
            cache, tokens, positions, active, finite, out, counts = state
            attend = self._attend(cache, Rows(batch.block_tables, positions, active), None)
            logits = model.logits(model(tokens, positions, attend))  # [D, R, V]
            is_finite = jnp.all(jnp.isfinite(logits), axis=-1)
            finite &= is_finite | ~active
            active &= is_finite
            tokens = jnp.where(active, self._sample(logits, batch.sampling, positions + 1), tokens)
            out = lax.dynamic_update_index_in_dim(out, tokens, i, axis=2)
            positions += active.astype(jnp.int32)
            counts += active.astype(jnp.int32)
            active &= ~is_stop(tokens, batch.stop_token_ids) & (counts < batch.num_remaining)
            return (attend.cache, tokens, positions, active, finite, out, counts), logits

        rows = batch.slots.shape
        state = (
            cache,
            tokens,
            batch.positions,
            active,
            jnp.ones(rows, bool),
            jnp.zeros((*rows, self.num_steps), jnp.int32),
            jnp.zeros(rows, jnp.int32),
        )
        if self.num_steps == 1:
            state, logits = step(0, state)
            activations = Activations(logits, None)
        else:
            state = lax.fori_loop(0, self.num_steps, lambda i, state: step(i, state)[0], state)
            activations = None
        cache, tokens, _, active, finite, out, counts = state
        return cache, slots.put(batch.slots, tokens, ~active), StepOutput(out, counts, finite), activations

    def prefill(
        self, weights: Arrays, cache: Cache, slots: SlotState, batch: StepBatch
    ) -> tuple[Cache, SlotState, StepOutput, Activations]:
        """Caches each shard's chunks and decodes one token of the other rows. Donates `cache` and `slots`."""
        assert batch.chunks is not None
        model, chunks = self.definition.bind(weights), batch.chunks
        num_rows = batch.slots.shape[1] - chunks.lengths.shape[1]  # the chunks' rows are behind them
        last_tokens, stopped = self._last_tokens(slots, batch)
        active = ~stopped & (batch.num_remaining > 0)
        active = jnp.concatenate([active[:, :num_rows], chunks.lengths > 0], axis=1)
        tokens = jnp.concatenate([last_tokens[:, :num_rows], chunks.tokens], axis=1)
        place = jax.vmap(functools.partial(token_places, num_tokens=chunks.tokens.shape[1]))(chunks.lengths)
        positions = jnp.take_along_axis(chunks.starts, place.sequence, axis=1) + place.offset
        positions = jnp.concatenate([batch.positions[:, :num_rows], positions], axis=1)
        rows = Rows(*(x[:, :num_rows] for x in (batch.block_tables, batch.positions, active)))
        prompts = Prompts(batch.block_tables[:, num_rows:], chunks.starts, chunks.lengths)
        attend = self._attend(cache, rows if num_rows else None, prompts)
        hidden = model(tokens, positions, attend)
        last = num_rows + jnp.maximum(jnp.cumsum(chunks.lengths, axis=1) - 1, 0)
        of_chunks = jnp.take_along_axis(hidden, last[..., None], axis=1)
        logits = model.logits(jnp.concatenate([hidden[:, :num_rows], of_chunks], axis=1))
        finite = jnp.all(jnp.isfinite(logits), axis=-1) | ~active
        new = self._sample(logits, batch.sampling, batch.positions + 1)
        counts = (active & finite & (batch.num_remaining > 0)).astype(jnp.int32)
        stopped = (counts == 0) | is_stop(new, batch.stop_token_ids) | (batch.num_remaining == 1)
        activations = Activations(logits, self._pad(hidden[:, num_rows:]))
        output = StepOutput(new[..., None], counts, finite)
        return attend.cache, slots.put(batch.slots, new, stopped), output, activations

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
        flat = logits.reshape(-1, logits.shape[-1])
        return sample(flat, sampling, positions.reshape(-1), self._gather).reshape(positions.shape)

    def _gather(self, logits: jax.Array) -> jax.Array:
        return self.definition.partitioner.constrain(logits, (ax.BATCH, None))

    def _attend(self, cache: Cache, rows: Rows | None, prompts: Prompts | None) -> PagedAttention:
        specs = attention_specs(self.definition.decoder_config, self.definition.partitioner, self.page_size)
        return PagedAttention(
            cache,
            rows,
            prompts,
            specs=specs,
            backend=paged_attention.backend(self.backend_name, *specs),
            partitioner=self.definition.partitioner,
        )
