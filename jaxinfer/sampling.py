"""Choosing the next token, on the device, without sorting the vocabulary.

A row's draw depends on its logits, its seed and the position of the token, and on nothing else: not on the
batch, its shape, or how many steps a dispatch runs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.draw import Kernel, RowParams
from pallas_kernels.noise import gumbel, ordered_bits

Draw = Callable[..., jax.Array]


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
    in_each_shard: Callable[[Draw], Draw] = lambda draw: draw,
    *,
    kernel: Kernel | None = None,
) -> jax.Array:
    """Token ids int32 [B] from float32 logits [B, V] for the tokens at `positions` int32 [B].

    A batch of greedy rows pays for an argmax only, and one without top-k, top-p and min-p for no look at what is above
    a token. `in_each_shard` has that done for the rows of each data shard apart, with all of the vocabulary: there are
    several passes, as many as a shard's own rows need, and the devices would agree on each. `kernel` is to do all of
    it, and draws the same; a row's logits must be whole in each device.
    """
    if kernel is not None:
        rows = RowParams(
            temperature=jnp.where(params.draws, params.temperature, 0),
            top_k=jnp.where(params.truncates, params.top_k, 0),
            top_p=jnp.where(params.truncates, params.top_p, 1),
            min_p=jnp.where(params.truncates, params.min_p, 0),
            seed=params.seed,
            position=positions.astype(jnp.uint32),
        )
        return in_each_shard(kernel)(logits, rows)
    greedy = argmax(logits)

    def draw_likely(scaled: jax.Array) -> jax.Array:
        is_greedy = params.temperature == 0  # nothing is drawn for these, so nothing keeps others waiting
        top_k, top_p = jnp.where(is_greedy, 0, params.top_k), jnp.where(is_greedy, 1.0, params.top_p)
        return in_each_shard(_draw_likely)(scaled, params.min_p, top_k, top_p, params.seed, positions)

    def draw_any_way() -> jax.Array:
        # Below the maximum, so that a temperature near 0 drives all others to -inf and none to inf.
        scaled = logits - jnp.max(logits, axis=-1, keepdims=True)
        scaled /= jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
        draw_any = lambda scaled: argmax(_perturbed(scaled, params.seed, positions))  # noqa: E731
        return jnp.where(params.temperature > 0, lax.cond(params.truncates, draw_likely, draw_any, scaled), greedy)

    return lax.cond(params.draws, draw_any_way, lambda: greedy)


def _draw_likely(
    logits: jax.Array, min_p: jax.Array, top_k: jax.Array, top_p: jax.Array, seed: jax.Array, positions: jax.Array
) -> jax.Array:
    logits = drop_unlikely(logits, min_p)
    return first_likely(logits, _perturbed(logits, seed, positions), top_k, top_p)


def _perturbed(logits: jax.Array, seed: jax.Array, positions: jax.Array) -> jax.Array:
    """Of which the largest is an exact draw from softmax(logits): Gumbel-max."""
    token_ids = jnp.arange(logits.shape[-1], dtype=jnp.uint32)
    return logits + jax.vmap(gumbel, in_axes=(0, 0, None))(seed, positions.astype(jnp.uint32), token_ids)


def drop_unlikely(logits: jax.Array, min_p: jax.Array) -> jax.Array:
    """Drops the tokens less than min_p times as likely as the row's likeliest. float32 [B, V] -> same.

    They become -inf; a token that is exactly at the bound stays. A ratio of probabilities is a difference of
    logits, so this takes one maximum and no softmax.
    """
    bound = jnp.max(logits, axis=-1) + jnp.log(min_p)  # min_p 0: -inf, or NaN beside an infinite logit
    return jnp.where(logits < bound[:, None], -jnp.inf, logits)  # not "keep >=": nothing is below -inf or NaN


class _Sought(NamedTuple):
    """Of each row."""

    floor: jax.Array  # float32; logits that are no higher are cut
    ceiling: jax.Array  # float32; those that are higher are kept
    token: jax.Array  # int32
    is_found: jax.Array  # bool


def first_likely(logits: jax.Array, scores: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """Of each row the token with the highest score among the top_k likeliest, and of those the likeliest of top_p.

    logits and scores float32 [B, V], the largest logit 0 -> int32 [B]. Tokens that tie with the last one kept are kept.

    The highest of all is kept if fewer than top_k tokens are likelier, and these have less than top_p together. If not,
    neither is any token that is no likelier than it, so the next is looked for among those that are. Of scores that are
    draws from softmax the first is kept with a probability of top_p, so that a few turns do for a batch; and a second
    bound, half way to what is known to be kept, halves what is left where that is not so. These are the two pivots of
    "Sorting-Free GPU Kernels for LLM Sampling" (FlashInfer, 2025), whose draws are new in each turn; here scores stay,
    so that a row's token does not depend on the turns.
    """
    top_k = jnp.where(top_k > 0, jnp.minimum(top_k, logits.shape[-1]), logits.shape[-1])
    cuts = top_p < 1
    mass = lax.cond(jnp.any(cuts & (top_k < logits.shape[-1])), _mass_of_likeliest, _mass, logits, top_k)
    # At least 1e-30: what is above the likeliest has a mass of 0, and that has to be less.
    enough = jnp.where(cuts, jnp.maximum(top_p * mass, 1e-30), jnp.inf)

    def is_cut(bound: jax.Array) -> jax.Array:
        """Whether tokens no likelier than it are. Never of a row with a NaN, which would have no end."""
        is_likelier = logits > bound[:, None]
        return (jnp.sum(is_likelier, axis=-1) >= top_k) | (_mass_where(is_likelier, logits) >= enough)

    def turn(state: _Sought) -> _Sought:
        left = jnp.where(logits > state.floor[:, None], scores, -jnp.inf)
        is_highest = left == jnp.max(left, axis=-1, keepdims=True)
        token, logit = _first(is_highest), jnp.max(jnp.where(is_highest, logits, -jnp.inf), axis=-1)
        between = (logit + state.ceiling) / 2
        is_found, is_above = ~is_cut(logit), is_cut(between)
        floor = jnp.where(is_found, state.floor, jnp.where(is_above, between, logit))
        return _Sought(floor, jnp.where(is_above, state.ceiling, between), token, is_found)

    rows = logits.shape[:1]
    start = _Sought(jnp.full(rows, -jnp.inf), jnp.zeros(rows), jnp.zeros(rows, jnp.int32), jnp.zeros(rows, jnp.bool_))
    return lax.while_loop(lambda state: ~jnp.all(state.is_found), turn, start).token


def _mass_where(mask: jax.Array, logits: jax.Array) -> jax.Array:
    return jnp.sum(jnp.where(mask, jnp.exp(logits), 0.0), axis=-1)


def _mass(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    del top_k
    return jnp.sum(jnp.exp(logits), axis=-1)


def _mass_of_likeliest(logits: jax.Array, top_k: jax.Array) -> jax.Array:
    """Sum of exp(logit) over the top_k likeliest of each row, and those that tie with the last.

    Their bound is found bit by bit from the top, until exactly top_k are above it.
    """
    order = ordered_bits(logits)

    def is_sought(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        bit, _, is_exact = state
        return (bit > 0) & ~jnp.all(is_exact)

    def turn(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        bit, bound, is_exact = state
        higher = bound | bit
        count = jnp.sum(order >= higher[:, None], axis=-1)
        return bit >> 1, jnp.where(count >= top_k, higher, bound), is_exact | (count == top_k)

    state = jnp.uint32(1 << 31), jnp.zeros(order.shape[:1], jnp.uint32), top_k == logits.shape[-1]
    _, bound, _ = lax.while_loop(is_sought, turn, state)
    return _mass_where(order >= bound[:, None], logits)


def argmax(x: jax.Array) -> jax.Array:
    """Of each row: [B, V] -> int32 [B]. Of a row with a NaN some token.

    In two reductions of numbers, which XLA makes vector code of on a CPU, and not of one of pairs: 6.5 against 9.7 ms
    for 16 rows of 131,072, and 15 against 136 where noise is added on the way.
    """
    return _first(x == jnp.max(x, axis=-1, keepdims=True))


def _first(mask: jax.Array) -> jax.Array:
    """The lowest id of each row; the last one if there is none."""
    last = mask.shape[-1] - 1
    return jnp.min(jnp.where(mask, jnp.arange(last + 1, dtype=jnp.int32), last), axis=-1)
