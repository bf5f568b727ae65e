"""Whether what a backend is given fits together. All raise ValueError where it does not."""

import jax.numpy as jnp

from pallas_kernels.paged_attention.pages import values_and_scales
from pallas_kernels.paged_attention.spec import AttentionSpec


def check_rows(q, k_pages, v_pages, block_tables, positions, spec: AttentionSpec, sinks=None, columns=None) -> None:
    """Arguments of `paged_attention` and `partial_paged_attention`."""
    b, t = positions.shape
    if q.shape != (b, t, spec.num_q_heads, spec.head_dim):
        raise ValueError(f"q has shape {q.shape}; expected {(b, t, spec.num_q_heads, spec.head_dim)} for {spec}")
    _check_pages(q, k_pages, v_pages, spec, sinks)
    _check_tables(block_tables, columns, b, positions=positions)


def check_ragged(q, k_pages, v_pages, block_tables, starts, lengths, spec: AttentionSpec, sinks=None, columns=None):
    """Arguments of `ragged_paged_attention` and `ragged_partial_paged_attention`."""
    if q.shape != (len(q), spec.num_q_heads, spec.head_dim):
        raise ValueError(f"q has shape {q.shape}; expected (tokens, {spec.num_q_heads}, {spec.head_dim}) for {spec}")
    _check_pages(q, k_pages, v_pages, spec, sinks)
    for name, array in (("starts", starts), ("lengths", lengths)):
        if array.shape != (len(block_tables),):
            raise ValueError(f"{name} has shape {array.shape}; expected ({len(block_tables)},), one of each sequence")
    _check_tables(block_tables, columns, len(block_tables), starts=starts, lengths=lengths)


def _check_pages(q, k_pages, v_pages, spec: AttentionSpec, sinks) -> None:
    if sinks is not None and sinks.shape != (spec.num_q_heads,):
        raise ValueError(f"sinks has shape {sinks.shape}; expected {(spec.num_q_heads,)} for {spec}")
    page_shape = (spec.num_kv_heads, spec.page_size, spec.head_dim)
    if (v_pages is None) != (spec.value_dim is not None):
        raise ValueError(f"v_pages is {'None' if v_pages is None else 'given'}; expected the other for {spec}")
    num_pages, dtype = len(values_and_scales(k_pages)[0]), jnp.dtype(spec.cache_dtype or q.dtype)
    for name, pages in (("k_pages", k_pages), ("v_pages", k_pages if v_pages is None else v_pages)):
        values, scales = values_and_scales(pages)
        if values.shape != (num_pages, *page_shape):
            raise ValueError(f"{name} has shape {values.shape}; expected (num_pages, *{page_shape}) for {spec}")
        if values.dtype != dtype:
            raise ValueError(f"{name} is {values.dtype}, q is {q.dtype}; expected {dtype} for {spec}")
        if (scales is None) != (spec.cache_dtype is None):
            raise ValueError(f"{name} has {'no scales' if scales is None else 'scales'}; expected the other for {spec}")
        if scales is not None and (scales.shape, scales.dtype) != (values.shape[:-1], jnp.float32):
            raise ValueError(f"{name}.scales is {scales.dtype}{scales.shape}; expected float32{values.shape[:-1]}")


def _check_tables(block_tables, columns, num_rows: int, **others) -> None:
    if block_tables.ndim != 2 or block_tables.shape[0] != num_rows:
        raise ValueError(f"block_tables has shape {block_tables.shape}; expected ({num_rows}, pages per sequence)")
    if columns is not None and columns.shape != block_tables.shape:
        raise ValueError(f"columns has shape {columns.shape}; expected that of block_tables, {block_tables.shape}")
    for name, ids in {"block_tables": block_tables, "columns": columns, **others}.items():
        if ids is not None and ids.dtype != jnp.int32:
            raise ValueError(f"{name} is {ids.dtype}; expected int32")
