"""Draws of next tokens in two launches, without the host: for GPUs, by Pallas' Triton lowering.

What XLA makes of `jaxinfer.sampling` asks the host whether to draw at all, whether to cut, and after each turn whether
all rows have their token: the GPU waits for each answer. Here

    noise    one program for each piece of a row: the scores, of which the highest is an exact draw
    choice   one program for each row: turns over the row until its token is found, as `sampling.first_likely` has them

and all that the host does is to start both, in one graph with the layers. One program per row is what FlashInfer's
kernels have, too ("Sorting-Free GPU Kernels for LLM Sampling", 2025).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.draw.row_params import RowParams
from pallas_kernels.noise import gumbel, ordered_bits
from pallas_kernels.triton_launch import launch

_PIECE = 4096  # logits of a row that a program has at once
_NUM_WARPS = 8
T = TypeVar("T")


class _Rows(NamedTuple):
    """Of each row, [B]."""

    params: RowParams
    highest: Any  # float32; the largest logit


def draw(logits: jax.Array, params: RowParams) -> jax.Array:
    """Token ids int32 [B] from float32 logits [B, V]. Interpreted on a CPU."""
    num_rows, vocab_size = logits.shape
    piece = min(_PIECE, 1 << (vocab_size.bit_length() - 1))
    whole = functools.partial(jax.tree.map, lambda a: pl.BlockSpec(a.shape, lambda *_: (0,) * len(a.shape)))
    rows = _Rows(params, jnp.max(logits, axis=-1))
    run = functools.partial(launch, num_warps=_NUM_WARPS, num_stages=1)
    scores = run(
        functools.partial(_noise_kernel, piece=piece),
        (rows, logits),
        grid=(num_rows, pl.cdiv(vocab_size, piece)),
        in_specs=whole((rows, logits)),
        out_shape=logits,
        out_specs=whole(logits),
    )
    out = jax.ShapeDtypeStruct((num_rows,), jnp.int32)
    return run(
        functools.partial(_choice_kernel, piece=piece),
        (rows, logits, scores),
        grid=(num_rows,),
        in_specs=whole((rows, logits, scores)),
        out_shape=out,
        out_specs=whole(out),
    )


def _noise_kernel(rows: _Rows, logits: Any, scores: Any, *, piece: int) -> None:
    """Nothing for a greedy row."""
    row = pl.program_id(0)
    of_row = jax.tree.map(lambda ref: ref[row], rows)
    # The last piece begins earlier than it would, so that all reads and writes are in bounds.
    start = jnp.minimum(pl.program_id(1) * piece, logits.shape[1] - piece)

    @pl.when(of_row.params.temperature > 0)
    def _() -> None:
        here = pl.ds(start, piece)
        token_ids = (start + jnp.arange(piece, dtype=jnp.int32)).astype(jnp.uint32)
        noise = gumbel(of_row.params.seed, of_row.params.position, token_ids)
        scores[row, here] = _scaled(logits[row, here], of_row) + noise


class _Best(NamedTuple):
    """In each lane, [piece]."""

    value: jax.Array  # float32
    token: jax.Array  # int32


class _Above(NamedTuple):
    """What is likelier than a bound; in each lane, [piece], or of a row."""

    tokens: jax.Array  # int32; how many
    mass: jax.Array  # float32


class _Sought(NamedTuple):
    """Of a row; as `jaxinfer.sampling.first_likely` has it."""

    floor: jax.Array  # float32; logits that are no higher are cut
    ceiling: jax.Array  # float32; those that are higher are kept
    token: jax.Array  # int32
    is_found: jax.Array  # bool


def _choice_kernel(rows: _Rows, logits: Any, scores: Any, tokens: Any, *, piece: int) -> None:
    tokens[pl.program_id(0)] = _Row(rows, logits, scores, piece).choose()


class _Row:
    """A row that is read again and again, piece by piece."""

    def __init__(self, rows: _Rows, logits: Any, scores: Any, piece: int):
        self._index, self._piece = pl.program_id(0), piece
        self._row = jax.tree.map(lambda ref: ref[self._index], rows)
        self._params = self._row.params
        self._logits, self._scores, self._size = logits, scores, logits.shape[1]

    def choose(self) -> jax.Array:
        return lax.cond(self._params.temperature > 0, self._drawn, self._likeliest)

    def _likeliest(self) -> jax.Array:
        return self._first(lambda at: self._logits[self._index, at])

    def _drawn(self) -> jax.Array:
        """The token of the highest score that min-p, top-k and top-p keep."""
        top_k = jnp.where(self._params.top_k > 0, jnp.minimum(self._params.top_k, self._size), self._size)
        enough = self._enough(top_k)

        def is_cut(above: _Above) -> jax.Array:
            return (above.tokens >= top_k) | (above.mass >= enough)

        def turn(state: _Sought) -> _Sought:
            scores = lambda at: self._scores[self._index, at]  # noqa: E731
            token = self._first(lambda at: jnp.where(self._read(at) > state.floor, scores(at), -jnp.inf))
            logit = self._read(token)
            between = (logit + state.ceiling) / 2
            above, above_between = self._above(logit, between)
            is_found, is_cut_between = ~is_cut(above), is_cut(above_between)
            floor = jnp.where(is_found, state.floor, jnp.where(is_cut_between, between, logit))
            return _Sought(floor, jnp.where(is_cut_between, state.ceiling, between), token, is_found)

        start = _Sought(jnp.float32(-jnp.inf), jnp.float32(0), jnp.int32(0), jnp.bool_(False))
        return lax.while_loop(lambda state: ~state.is_found, turn, start).token

    def _enough(self, top_k: jax.Array) -> jax.Array:
        """The mass of likelier tokens with which one is cut."""
        top_p = self._params.top_p

        def of_mass() -> jax.Array:
            mass = lax.cond(top_k < self._size, lambda: self._mass_of_likeliest(top_k), self._mass)
            # At least 1e-30: what is above the likeliest has a mass of 0, and that has to be less.
            return jnp.maximum(top_p * mass, 1e-30)

        # A branch's result must be computed: the lowering knows no constants there.
        return jnp.where(top_p < 1, lax.cond(top_p < 1, of_mass, lambda: top_p), jnp.inf)

    def _mass(self) -> jax.Array:
        return self._sum(lambda at: jnp.exp(self._read(at)), jnp.float32(0))

    def _mass_of_likeliest(self, top_k: jax.Array) -> jax.Array:
        """Of the top_k likeliest, and those that tie with the last; their bound is found bit by bit from the top."""

        def is_sought(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            bit, _, is_exact = state
            return (bit > 0) & ~is_exact

        def turn(state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
            bit, bound, _ = state
            higher = bound | bit
            count = self._sum(lambda at: (ordered_bits(self._read(at)) >= higher).astype(jnp.int32), jnp.int32(0))
            return bit >> 1, jnp.where(count >= top_k, higher, bound), count == top_k

        _, bound, _ = lax.while_loop(is_sought, turn, (jnp.uint32(1 << 31), jnp.uint32(0), jnp.bool_(False)))
        masses = lambda x: jnp.where(ordered_bits(x) >= bound, jnp.exp(x), 0.0)  # noqa: E731
        return self._sum(lambda at: masses(self._read(at)), jnp.float32(0))

    def _above(self, *bounds: jax.Array) -> list[_Above]:
        """What is likelier than each."""

        def look(at: Any) -> list[_Above]:
            x = self._read(at)
            mass = jnp.exp(x)
            return [_Above((x > bound).astype(jnp.int32), jnp.where(x > bound, mass, 0.0)) for bound in bounds]

        return self._sum(look, [_Above(jnp.int32(0), jnp.float32(0))] * len(bounds))

    def _first(self, read: Callable[[Any], jax.Array]) -> jax.Array:
        """The lowest token of those with the highest value."""

        def look(at: Any, ids: jax.Array, first: jax.Array, best: _Best) -> _Best:
            del first
            values = read(at)
            is_better = values > best.value
            return _Best(jnp.where(is_better, values, best.value), jnp.where(is_better, ids, best.token))

        none = _Best(jnp.full(self._piece, -jnp.inf, jnp.float32), jnp.zeros(self._piece, jnp.int32))
        best = self._over_pieces(look, none)
        return jnp.min(jnp.where(best.value == jnp.max(best.value), best.token, self._size - 1))

    def _sum(self, read: Callable[[Any], T], zero: T) -> T:
        """Of what `read` gives of a piece, [piece] each, in all pieces -> []; from `zero` on."""

        def look(at: Any, ids: jax.Array, first: jax.Array, total: T) -> T:
            # The last piece begins within the one before.
            return jax.tree.map(lambda a, b: a + jnp.where(ids >= first, b, jnp.zeros_like(b)), total, read(at))

        lanes = jax.tree.map(lambda a: jnp.full(self._piece, a), zero)
        return jax.tree.map(jnp.sum, self._over_pieces(look, lanes))

    def _over_pieces(self, look: Callable[..., T], state: T) -> T:
        """`look` gets a piece's place, its tokens, the first of them that no piece before it had, and the state."""
        num_whole, lanes = self._size // self._piece, jnp.arange(self._piece, dtype=jnp.int32)

        def at(start: Any, first: Any, state: T) -> T:
            return look(pl.ds(start, self._piece), start + lanes, first, state)

        state = lax.fori_loop(0, num_whole, lambda i, state: at(i * self._piece, i * self._piece, state), state)
        if self._size % self._piece:
            state = at(self._size - self._piece, num_whole * self._piece, state)
        return state

    def _read(self, at: Any) -> jax.Array:
        """Logits with the temperature, the largest 0; those that min_p drops are -inf."""
        x = _scaled(self._logits[self._index, at], self._row)
        return jnp.where(x < jnp.log(self._params.min_p), -jnp.inf, x)  # not "keep >=": nothing is below NaN


def _scaled(logits: jax.Array, row: _Rows) -> jax.Array:
    """Below the largest, so that a temperature near 0 drives all others to -inf and none to inf."""
    return (logits - row.highest) / row.params.temperature
