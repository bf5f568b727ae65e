"""The two kernels of `triton.py`, and how they are launched."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from pallas_kernels.paged_attention import work_list
from pallas_kernels.paged_attention.pages import Pages, product_dtype, values_and_scales
from pallas_kernels.paged_attention.partial import PartialSoftmax
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.paged_attention.tiling import Tiling
from pallas_kernels.precision import matmul_precision
from pallas_kernels.triton_launch import launch

_FAR = jnp.iinfo(jnp.int32).max


class Inputs(NamedTuple):
    """Of the first kernel. In it, references to them."""

    items: work_list.Items
    q: jax.Array  # [S, N, H]
    positions: jax.Array  # int32 [S]
    k_pages: Pages  # [P, K, page_size, H]
    v_pages: Pages | None
    block_tables: jax.Array  # int32 [C, M]
    columns: jax.Array | None  # int32 [C, M]
    sinks: jax.Array | None  # [N]


class _State(NamedTuple):
    """`PartialSoftmax`, with `largest` of scores times log2(e), and `out` in pieces."""

    largest: jax.Array  # float32 [rows]
    total: jax.Array  # float32 [rows]
    out: tuple[jax.Array, ...]  # float32 [rows, size]


def _pieces(first: int, end: int) -> list[pl.Slice]:
    """Slices whose sizes are powers of two."""
    pieces = []
    while first < end:
        size = 1 << ((end - first).bit_length() - 1)
        pieces.append(pl.ds(first, size))
        first += size
    return pieces


def _attend_kernel(inputs: Inputs, outs: tuple[Any, ...], parts: PartialSoftmax, *, tiling: Tiling) -> None:
    index, program = pl.program_id(0), pl.program_id(1)
    item = jax.tree.map(lambda ref: ref[index], inputs.items)

    @pl.when(item.num_tokens > 0)
    def _() -> None:
        rows = tiling.row(item.first_token, item.num_tokens, program)
        state = _over_blocks(inputs, item, rows, tiling)

        @pl.when(item.part < 0)
        def _() -> None:
            _store(outs, rows, state, inputs.sinks, tiling)

        @pl.when(item.part >= 0)
        def _() -> None:
            parts.largest[item.part, :], parts.total[item.part, :] = state.largest, state.total
            for piece, out in zip(_pieces(0, tiling.spec.out_dim), state.out, strict=True):
                parts.out[item.part, :, piece] = out


def _merge_kernel(tiles: work_list.Tiles, sinks: Any, parts: PartialSoftmax, _: Any, outs: Any, *, tiling: Tiling):
    index, program = pl.program_id(0), pl.program_id(1)
    tile = jax.tree.map(lambda ref: ref[index], tiles)

    def add(part: jax.Array, state: _State) -> _State:
        largest = jnp.maximum(state.largest, parts.largest[part, :])
        finite = jnp.where(largest > -jnp.inf, largest, 0)
        kept, added = jnp.exp2(state.largest - finite), jnp.exp2(parts.largest[part, :] - finite)
        pieces = _pieces(0, tiling.spec.out_dim)
        out = [
            o * kept[:, None] + parts.out[part, :, p] * added[:, None] for o, p in zip(state.out, pieces, strict=True)
        ]
        return _State(largest, state.total * kept + parts.total[part, :] * added, tuple(out))

    @pl.when(tile.num_parts > 0)
    def _() -> None:
        state = lax.fori_loop(tile.first_part, tile.first_part + tile.num_parts, add, _nothing(tiling))
        _store(outs, tiling.row(tile.first_token, tile.num_tokens, program), state, sinks, tiling)


def _nothing(tiling: Tiling) -> _State:
    pieces = _pieces(0, tiling.spec.out_dim)
    return _State(
        jnp.full(tiling.rows, -jnp.inf, jnp.float32),
        jnp.zeros(tiling.rows, jnp.float32),
        tuple(jnp.zeros((tiling.rows, piece.size), jnp.float32) for piece in pieces),
    )


def _over_blocks(inputs: Inputs, item: work_list.Items, rows: tuple[jax.Array, jax.Array], tiling: Tiling) -> _State:
    spec = tiling.spec
    out_pieces = _pieces(0, spec.out_dim)
    pieces = [*out_pieces, *_pieces(spec.out_dim, spec.head_dim)] if spec.value_dim else _pieces(0, spec.head_dim)
    queries = [inputs.q[(*rows, piece)] for piece in pieces]
    position = inputs.positions[rows[0]]
    newest, oldest = jnp.max(position), jnp.min(jnp.where(position < 0, _FAR, position))
    num_slots = inputs.block_tables.shape[1] * spec.page_size
    (k_pages, k_scales), (v_pages, v_scales) = map(values_and_scales, (inputs.k_pages, inputs.v_pages))
    if v_pages is None:
        v_scales = k_scales
    q_dtype, value_dtype = inputs.q.dtype, product_dtype(inputs.q.dtype, spec.cache_dtype)
    dot = functools.partial(lax.dot_general, precision=matmul_precision(q_dtype), preferred_element_type=jnp.float32)

    def add(block: jax.Array, state: _State) -> _State:
        slot = block * tiling.tuning.block_tokens + jnp.arange(tiling.tuning.block_tokens, dtype=jnp.int32)
        column = lax.div(jnp.minimum(slot, num_slots - 1), spec.page_size)
        offset = lax.rem(slot, spec.page_size)
        cached = slot
        if inputs.columns is not None:
            first = inputs.columns[item.sequence, column] * spec.page_size
            cached = jnp.where(slot < num_slots, first + offset, _FAR)
        page = inputs.block_tables[item.sequence, column]
        keys = [k_pages[page, offset, piece].astype(q_dtype) for piece in pieces]
        products = [dot(q, k, (((1,), (1,)), ((), ()))) for q, k in zip(queries, keys, strict=True)]
        product = functools.reduce(jnp.add, products)
        if k_scales is not None:
            product *= k_scales[page, offset][None]
        score = _capped(product, spec)
        visible, readable = cached <= position[:, None], cached <= newest
        if spec.window is not None:
            visible &= cached > position[:, None] - spec.window
            readable &= cached > oldest - spec.window
        score = jnp.where(visible, score, -jnp.inf)
        largest = jnp.maximum(state.largest, jnp.max(score, axis=1))
        finite = jnp.where(largest > -jnp.inf, largest, 0)  # of a query that sees nothing
        weight = jnp.exp2(score - finite[:, None])
        kept = jnp.exp2(state.largest - finite)
        scaled = weight if v_scales is None else weight * jnp.where(readable, v_scales[page, offset], 0)[None]
        new = []
        for i, (piece, out) in enumerate(zip(out_pieces, state.out, strict=True)):
            value = (keys[i] if v_pages is None else v_pages[page, offset, piece]).astype(value_dtype)
            value = jnp.where(readable[:, None], value, jnp.zeros_like(value))  # it may be stale: 0 * NaN is NaN
            product = dot(scaled.astype(value_dtype), value, (((1,), (0,)), ((), ())))
            new.append(out * kept[:, None] + product)
        return _State(largest, state.total * kept + jnp.sum(weight, axis=1), tuple(new))

    return lax.fori_loop(item.first_block, item.end_block, add, _nothing(tiling))


def _capped(product: jax.Array, spec: AttentionSpec) -> jax.Array:
    """The score times log2(e)."""
    if spec.soft_cap is None:
        return product * (spec.scale * math.log2(math.e))
    return jnp.tanh(product * (spec.scale / spec.soft_cap)) * (spec.soft_cap * math.log2(math.e))


def _store(outs: tuple[Any, ...], rows: tuple[jax.Array, jax.Array], state: _State, sinks: Any, tiling: Tiling) -> None:
    largest, total, out_ref = state.largest, state.total, outs[-1]
    if len(outs) > 1:
        outs[0][rows], outs[1][rows] = largest * math.log(2), total
        factor = jnp.ones_like(total)
    else:
        kept = jnp.ones_like(total)
        if sinks is not None:
            sink = sinks[rows[1]].astype(jnp.float32) * math.log2(math.e)
            most = jnp.maximum(largest, sink)
            kept = jnp.exp2(largest - most)
            total = total * kept + jnp.exp2(sink - most)
        factor = kept / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    for piece, out in zip(_pieces(0, tiling.spec.out_dim), state.out, strict=True):
        out_ref[(*rows, piece)] = (out * factor[:, None]).astype(out_ref.dtype)


@functools.partial(jax.jit, static_argnames=("tiling", "is_part"))  # traced once for all layers of a kind
def attend(inputs: Inputs, tiles: work_list.Tiles, tiling: Tiling, is_part: bool) -> Any:
    """-> [S, N, out_dim] in q's dtype, or of a part `PartialSoftmax` of [S, N]."""
    spec, rows = tiling.spec, tiling.rows
    heads = inputs.q.shape[:2]
    num_parts = work_list.max_num_parts(tiling.tuning.extra_items)
    num_items, num_tiles = inputs.items.part.shape[0], tiles.num_parts.shape[0]

    def softmax(shape: tuple[int, ...]) -> PartialSoftmax:
        of_row = jax.ShapeDtypeStruct(shape, jnp.float32)
        out = jax.ShapeDtypeStruct((*shape, spec.out_dim), jnp.float32)
        return PartialSoftmax(of_row, of_row, out)  # pyright: ignore[reportArgumentType]

    outs = softmax(heads) if is_part else (jax.ShapeDtypeStruct((*heads, spec.out_dim), inputs.q.dtype),)
    parts = softmax((num_parts, tiling.num_programs, rows))
    whole = functools.partial(jax.tree.map, lambda x: pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape)))
    of_program = jax.tree.map(
        lambda x: pl.BlockSpec((x.shape[0], None, *x.shape[2:]), lambda _, n: (0, n, *(0,) * (len(x.shape) - 2))), parts
    )
    of_kv_head = functools.partial(
        jax.tree.map,
        lambda x: pl.BlockSpec(
            (x.shape[0], None, *x.shape[2:]), lambda _, n: (0, tiling.kv_head(n), *(0,) * (len(x.shape) - 2))
        ),
    )
    start = functools.partial(launch, num_warps=tiling.tuning.num_warps, num_stages=tiling.tuning.num_stages)
    in_specs = whole(inputs)._replace(k_pages=of_kv_head(inputs.k_pages), v_pages=of_kv_head(inputs.v_pages))
    outs, parts = start(
        functools.partial(_attend_kernel, tiling=tiling),
        (inputs,),
        grid=(num_items, tiling.num_programs),
        in_specs=(in_specs,),
        out_shape=(outs, parts),
        out_specs=(whole(outs), of_program),
    )
    arguments = (tiles, inputs.sinks, parts, outs)
    num_before = len(jax.tree.leaves(arguments[:3]))
    (outs,) = start(
        functools.partial(_merge_kernel, tiling=tiling),
        arguments,
        grid=(num_tiles, tiling.num_programs),
        in_specs=(whole(tiles), whole(inputs.sinks), of_program, whole(outs)),
        out_shape=(outs,),
        out_specs=(whole(outs),),
        input_output_aliases={num_before + i: i for i in range(len(outs))},
    )
    return outs if is_part else outs[0]
