"""What a request may do to its logits before a token is drawn: bias, bans and penalties, on the device.

In vLLM's order: allowed tokens and bias, banned words and too early stop tokens, then the penalties. Everything is
written for one row and mapped over the batch, so no index of one row can reach another's logits.

A row whose every token is banned comes out as -inf throughout, and `sampling.sample` then gives token 0: requests
that contradict themselves are for the host to refuse. Nothing here turns a finite logit into NaN, provided that
penalties and bias are finite (or -inf, for bias) and repetition penalties above 0.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class ProcessorArrays(NamedTuple):
    """Each row's parameters: NumPy on the host, traced inside a program."""

    presence_penalty: Any  # float32 [B]; subtracted once from every token of the output; 0 is neutral
    frequency_penalty: Any  # float32 [B]; subtracted per occurrence in the output; 0 is neutral
    repetition_penalty: Any  # float32 [B], above 0; makes tokens of prompt and output unlikelier; 1 is neutral
    prompt_len: Any  # int32 [B]; the output begins here
    min_len: Any  # int32 [B]; with fewer tokens, prompt and output, no stop token is drawn; 0 is neutral
    stop_token_ids: Any  # int32 [B, S]; -1 where unused
    bad_words: Any  # int32 [B, W, N]; each word at the right end of its N, -1 before it; all -1 where unused


def process(
    logits: jax.Array, arrays: ProcessorArrays, history: jax.Array, bias: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    """Logits float32 [B, V] for each row's next token; those of a row with neutral parameters stay bit for bit.

    Args:
      logits: float32 [B, V].
      arrays: parameters of the rows.
      history: int32 [B, L], the token at each position, in [0, V); anything at all from num_tokens on.
      bias: float32 [B, V], added; -inf for a token that is not allowed, 0 is neutral.
      num_tokens: int32 [B], prompt and output so far; 0 for a padding row.
    """
    return jax.vmap(_process_row)(logits, arrays, history, bias, num_tokens)


def _process_row(
    logits: jax.Array, params: ProcessorArrays, history: jax.Array, bias: jax.Array, num_tokens: jax.Array
) -> jax.Array:
    """float32 [V]; here and below every array lacks its B."""
    logits = jnp.where(bias == 0, logits, logits + bias)  # not simply the sum, for -0.0 + 0.0 is 0.0
    banned = jnp.concatenate([_completions(params, history, num_tokens), _early_stops(params, num_tokens)])
    logits = logits.at[_unused_past_end(banned, logits.size)].set(-jnp.inf, mode="drop")
    return _penalize(logits, params, history, num_tokens)


def _completions(params: ProcessorArrays, history: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """The last token of each bad word that is written but for it, else -1: int32 [W].

    As in vLLM the beginning must stand in the output: a word that the prompt begins is not recognised. With N 3,
    output [.., 7, 8] completes [7, 8, 9] and [-1, 8, 9] with 9, and [-1, -1, 9] always.
    """
    beginnings, last = params.bad_words[:, :-1], params.bad_words[:, -1]
    num_before = beginnings.shape[1]
    positions = num_tokens - num_before + jnp.arange(num_before, dtype=jnp.int32)
    written = history.at[positions].get(mode="clip")  # a position before the start fails the next line
    matches = (beginnings == written) & (positions >= params.prompt_len)
    return jnp.where(jnp.all(matches | (beginnings < 0), axis=1), last, -1)


def _early_stops(params: ProcessorArrays, num_tokens: jax.Array) -> jax.Array:
    """The stop tokens while it is too early for them, else -1: int32 [S]."""
    return jnp.where(num_tokens < params.min_len, params.stop_token_ids, -1)


def _penalize(logits: jax.Array, params: ProcessorArrays, history: jax.Array, num_tokens: jax.Array) -> jax.Array:
    """Repetition over prompt and output; frequency and presence over the output only: float32 [V]."""
    positions = jnp.arange(history.size, dtype=jnp.int32)
    in_output = (positions >= params.prompt_len).astype(jnp.int32)
    token_ids = jnp.where(positions < num_tokens, history, logits.size)  # past the end: dropped
    counts = jnp.zeros((2, logits.size), jnp.int32).at[in_output, token_ids].add(1, mode="drop")
    in_prompt, num_output = counts[0] > 0, counts[1].astype(jnp.float32)
    repetition = jnp.where(in_prompt | (num_output > 0), params.repetition_penalty, 1.0)
    logits = jnp.where(logits > 0, logits / repetition, logits * repetition)
    logits -= params.frequency_penalty * num_output
    return logits - params.presence_penalty * (num_output > 0).astype(jnp.float32)


def _unused_past_end(token_ids: jax.Array, vocab_size: int) -> jax.Array:
    """-1 becomes vocab_size, which a scatter with mode="drop" drops: JAX takes -1 itself for the last token."""
    return jnp.where(token_ids < 0, vocab_size, token_ids)
