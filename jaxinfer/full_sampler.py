"""The pure functions that more than a plain draw compiles from; `extras` says what goes into them.

They run behind a step that gives its logits out, so they are compiled once and not into every shape of a step.
Logits come together on each device first: a few rows of them travel, and no scatter or top-k crosses devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from jaxinfer.batch import StepBatch
from jaxinfer.extras import FullRows, Score, SlotLoad, SlotParams
from jaxinfer.logits_processors import process
from jaxinfer.logprobs import Logprobs, no_logprobs, token_logprobs
from jaxinfer.parameters import ModelDefinition
from jaxinfer.sampling import sample
from jaxinfer.sampling_params import MAX_LOGPROBS
from jaxinfer.steps import Arrays, SlotState, StepOutput, is_stop
from sharding_rules import axes as ax

_BLOCK = 32  # positions of a prompt whose logits exist at once


@dataclasses.dataclass(frozen=True)
class FullSampler:
    """`load`, `sample` and `score`, for one model."""

    definition: ModelDefinition

    @property
    def num_top(self) -> int:
        return min(MAX_LOGPROBS, self.definition.config.vocab_size)

    def load(self, params: SlotParams, load: SlotLoad) -> SlotParams:
        """Writes parameters into a slot of each shard. Donates `params`."""
        num_slots = params.history.shape[1]
        slots = jnp.where(load.slots < 0, num_slots, load.slots)  # past the end: dropped
        write = jax.vmap(lambda old, slot, new: old.at[slot].set(new, mode="drop"))
        return jax.tree.map(lambda old, new: write(old, slots, new), params, load.params)

    def sample(
        self,
        slots: SlotState,
        params: SlotParams,
        logits: jax.Array,
        output: StepOutput,
        batch: StepBatch,
        rows: FullRows,
    ) -> tuple[SlotState, SlotParams, StepOutput]:
        """Replaces the tokens that a step drew plainly. Donates `slots` and `params`.

        logits float32 [D, R, V] are the step's, `output` is what it gave of them; of the batch all but what the model
        read. A row none of whose tokens is allowed is reported like one that is not finite.
        """
        num_tokens = batch.positions + 1
        logits = _flat(self.definition.partitioner.constrain(logits, (ax.BATCH, None, None)))
        own = jax.vmap(lambda array, slots: array.at[slots].get(mode="clip"))
        history, bias, processors = jax.tree.map(lambda a: _flat(own(a, jnp.maximum(batch.slots, 0))), params)
        processed = process(logits, processors, history, bias, _flat(num_tokens))
        processed = jnp.where(_flat(rows.is_full)[:, None], processed, logits)  # others have no parameters in the slot
        sampling, partitioner = batch.sampling._replace(draws=rows.draws), self.definition.partitioner
        kernel = partitioner.draw_kernel
        tokens = sample(processed, sampling, _flat(num_tokens), partitioner.in_each_shard, kernel=kernel)
        has_choice = jnp.any(processed > -jnp.inf, axis=-1).reshape(num_tokens.shape)
        logprobs = lax.cond(
            rows.wants_logprobs,
            lambda: self._token_logprobs(logits, tokens),
            lambda: no_logprobs(tokens.shape, self.num_top),
        )
        tokens = tokens.reshape(num_tokens.shape)
        counts = jnp.where(has_choice, output.counts, 0)
        stopped = (counts == 0) | is_stop(tokens, batch.stop_token_ids) | (batch.num_remaining == 1)
        tokens = jnp.where(counts > 0, tokens, output.tokens[..., 0])
        logprobs = jax.tree.map(lambda a: a.reshape(*num_tokens.shape, *a.shape[1:]), logprobs)
        written = jnp.where(counts > 0, batch.slots, params.history.shape[1])  # past the end: dropped
        extend = jax.vmap(lambda old, slots, at, new: old.at[slots, at].set(new, mode="drop"))
        params = params._replace(history=extend(params.history, written, num_tokens, tokens))
        finite = output.finite & (has_choice | (output.counts == 0))
        return slots.put(batch.slots, tokens, stopped), params, StepOutput(tokens[..., None], counts, finite, logprobs)

    def score(self, weights: Arrays, hidden: jax.Array, score: Score) -> Logprobs:
        """Of each token in `score.targets` [D, T], by the activations [D, T, E] of the tokens before them.

        As many positions as the chunks of a shard have, block by block: the logits of all would not fit.
        """
        model, partitioner = self.definition.bind(weights), self.definition.partitioner
        num_shards, num_tokens = score.targets.shape
        block = min(_BLOCK, num_tokens)

        def score_block(i: jax.Array, done: Logprobs) -> Logprobs:
            start = i * block  # the slices move a last block that does not fit back, all alike
            logits = model.logits(lax.dynamic_slice_in_dim(hidden, start, block, axis=1))
            logits = partitioner.constrain(logits, (ax.BATCH, None, None))
            targets = lax.dynamic_slice_in_dim(score.targets, start, block, axis=1)
            new = self._token_logprobs(_flat(logits), _flat(targets))
            new = jax.tree.map(lambda a: a.reshape(num_shards, block, *a.shape[1:]), new)
            return jax.tree.map(lambda a, b: lax.dynamic_update_slice_in_dim(a, b, start, axis=1), done, new)

        empty = no_logprobs(score.targets.shape, self.num_top)
        return lax.fori_loop(0, (score.length + block - 1) // block, score_block, empty)

    def _token_logprobs(self, logits: jax.Array, token_ids: jax.Array) -> Logprobs:
        """In each data shard by itself: XLA would gather the rows of all for a top-k."""
        compute = functools.partial(token_logprobs, num_top=self.num_top)
        return self.definition.partitioner.in_each_shard(compute)(logits, token_ids)


def _flat(x: jax.Array) -> jax.Array:
    """[D, R, ...] -> [D * R, ...]."""
    return x.reshape(-1, *x.shape[2:])
