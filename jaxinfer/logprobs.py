"""Log-probabilities of drawn tokens and of the likeliest ones, on the device."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Logprobs(NamedTuple):
    """Of one token per row, beside the N likeliest; NumPy once on the host."""

    token: Any  # float32 [B]
    rank: Any  # int32 [B]; tokens at least as likely, itself included: 1 is the likeliest
    top_ids: Any  # int32 [B, N]; likeliest first, the lower id first among equals
    top: Any  # float32 [B, N]


def no_logprobs(shape: tuple[int, ...], num_top: int) -> Logprobs:
    """Zeros, with `shape` for the [B] above."""
    ids, values = (jnp.zeros((*shape, num_top), dtype) for dtype in (jnp.int32, jnp.float32))
    return Logprobs(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32), ids, values)


def token_logprobs(logits: jax.Array, token_ids: jax.Array, num_top: int) -> Logprobs:
    """Float32 log-softmax of logits [B, V] at `token_ids` int32 [B] and at the `num_top` (static) likeliest.

    A token has the same float in `token` and in `top`, for evaluations ask by equality whether a token was the
    likeliest. So both come out of one gather and one normaliser: of two, XLA might round one differently. Ranks and
    order compare logits, which log-softmax shifts alike, and rounds.

    A masked token (-inf) has -inf; so has every token of a row that is masked throughout.
    """
    logits = logits.astype(jnp.float32)
    # top_k puts 0.0 before -0.0, though they are equal.
    _, top_ids = lax.top_k(jnp.where(logits == 0, 0.0, logits), num_top)
    token_ids = token_ids[:, None]
    chosen = jnp.take_along_axis(logits, jnp.concatenate([token_ids, top_ids], axis=1), axis=1)
    peak = jnp.max(logits, axis=1, keepdims=True)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)  # -inf less -inf would be NaN
    total = jnp.sum(jnp.exp(logits - peak), axis=1, keepdims=True)
    log_total = jnp.where(total == 0, 0.0, jnp.log(total))
    values = chosen - peak - log_total
    rank = jnp.sum(logits >= chosen[:, :1], axis=1, dtype=jnp.int32)
    return Logprobs(values[:, 0], rank, top_ids, values[:, 1:])
