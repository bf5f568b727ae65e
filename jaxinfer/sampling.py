"""Choosing the next token, on the device, without sorting the vocabulary.

A row's draw depends on its logits, its seed and the position of the token, and on nothing else: not on the
batch, its shape, or how many steps a dispatch runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class SamplingArrays(NamedTuple):
    """Sampling parameters of each row: NumPy on the host, traced inside a program."""

    temperature: Any  # float32 [B]; 0 is greedy
    top_k: Any  # int32 [B]; 0 keeps all
    top_p: Any  # float32 [B] in (0, 1]; 1 keeps all
    min_p: Any  # float32 [B] in [0, 1]; 0 keeps all
    seed: Any  # uint32 [B]
    draws: Any  # bool []; whether any row's temperature is above 0
    truncates: Any  # bool []; whether any row uses top_k, top_p or min_p


def sample(
    logits: jax.Array,
    params: SamplingArrays,
    positions: jax.Array,
    gather: Callable[[jax.Array], jax.Array] = lambda x: x,
) -> jax.Array:
    """Token ids int32 [B] from float32 logits [B, V] for the tokens at `positions` int32 [B].

    A batch of greedy rows pays for an argmax only, and one without top-k, top-p and min-p for no threshold search.
    `gather` brings a split vocabulary together before that search, whose every pass would else be an all-reduce.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def keep_likely(scaled: jax.Array) -> jax.Array:
        return truncate(drop_unlikely(gather(scaled), params.min_p), params.top_k, params.top_p)

    def draw() -> jax.Array:
        # Below the maximum, so that a temperature near 0 drives all others to -inf and none to inf.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled /= jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
        scaled = lax.cond(params.truncates, keep_likely, lambda x: x, scaled)
        noise = jax.vmap(_gumbel, in_axes=(0, 0, None))(params.seed, positions, logits.shape[-1])
        drawn = jnp.argmax(scaled + noise, axis=-1).astype(jnp.int32)  # Gumbel-max: an exact draw from softmax(scaled)
        return jnp.where(params.temperature > 0, drawn, greedy)

    return lax.cond(params.draws, draw, lambda: greedy)


def drop_unlikely(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Drops the tokens less than min_p times as likely as the row's likeliest. float32 [B, V] -> same.

    They become -inf; a token that is exactly at the bound stays. A ratio of probabilities is a difference of
    logits, so this takes one maximum and no softmax.
    """
    bound = jnp.max(logits, axis=-1) + jnp.log(min_p)  # min_p 0: -inf, or NaN beside an infinite logit
    return jnp.where(logits < bound[:, None], -jnp.inf, logits)  # not "keep >=": nothing is below -inf or NaN


def truncate(logits: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Keeps the top_k likeliest tokens of each row, then the likeliest of those until top_p is reached.

    Everything else becomes -inf; tokens that tie with the last one kept are kept. float32 [B, V] -> same.
    """
    order = _ordered_bits(logits)
    top_k = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])

    def keep_likeliest(i: jax.Array, logits: jax.Array) -> jax.Array:
        """Turn 0 counts tokens, turn 1 adds up the probabilities of those that turn 0 kept."""
        weights = jnp.where(i == 0, jnp.ones_like(logits), jax.nn.softmax(logits, axis=-1))
        # At least 1e-30: to a target that rounds to 0 even nothing would be enough.
        target = jnp.where(i == 0, top_k.astype(jnp.float32), jnp.maximum(top_p, 1e-30))
        keep = order >= _largest_threshold(order, weights, target)[:, None]
        keep |= ((i == 1) & (top_p >= 1))[:, None]
        return jnp.where(keep, logits, -jnp.inf)

    return lax.fori_loop(0, 2, keep_likeliest, logits)  # a loop, so that the search is compiled once


def _largest_threshold(order: jax.Array, weights: jax.Array, target: jax.Array) -> jax.Array:
    """Per row the largest t with sum(weights[order >= t]) >= target: uint32 [B].

    Found bit by bit from the top, 32 passes over the row: exact, and far cheaper than a sort in XLA.
    """

    def try_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1) << (31 - i).astype(jnp.uint32))
        mass = jnp.sum(jnp.where(order >= candidate[:, None], weights, 0.0), axis=-1)
        return jnp.where(mass >= target, candidate, threshold)

    return lax.fori_loop(0, 32, try_bit, jnp.zeros(order.shape[:1], jnp.uint32))


def _ordered_bits(x: jax.Array) -> jax.Array:
    """uint32 that compare as the float32 do."""
    bits = lax.bitcast_convert_type(x, jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def _gumbel(seed: jax.Array, position: jax.Array, vocab_size: int) -> jax.Array:
    # Threefry takes a key of two words, and (seed, position) is one: no derivation in between to compile and run.
    key = jax.random.wrap_key_data(jnp.stack([seed, position.astype(jnp.uint32)]), impl="threefry2x32")
    return jax.random.gumbel(key, (vocab_size,), jnp.float32)
