"""Paged attention for CPUs: compiled C++, which reads the pages where they are.

Computes what `xla.py` documents. XLA:CPU has to gather pages first, a number at a time, and multiplies small matrices
one by one; `native/attention.h` does neither.
"""

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.native import build
from pallas_kernels.paged_attention.checks import check_ragged, check_rows
from pallas_kernels.paged_attention.pages import Pages, values_and_scales
from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.ragged import token_places, token_positions


def unsupported(spec: AttentionSpec, device: jax.Device | None = None) -> str | None:
    """Why `spec` cannot run on `device`, or None if it can."""
    if spec.context_size > 1:
        return "the pages of a sequence must be on one device"
    if device is None:
        return None
    return build.unavailable() if device.platform == "cpu" else "it is for CPUs"


def unreachable_pages(spec: AttentionSpec) -> range:
    """None."""
    del spec
    return range(0)


def workspace_bytes(
    spec: AttentionSpec, *, rows: int, chunks: int, chunk_tokens: int, context_tokens: int, itemsize: int
) -> int:
    """Most bytes that a step's attention needs beside the cache: an estimate. As in `xla.py`."""
    del chunks, context_tokens
    return 2 * (rows + chunk_tokens) * spec.num_q_heads * spec.out_dim * itemsize  # of rows and prompts, and together


def paged_attention(
    q: jax.Array,  # [B, T, N, H]
    k_pages: Pages,  # [P, K, page_size, H]
    v_pages: Pages | None,  # the same; None where spec.value_dim is not
    block_tables: jax.Array,  # int32 [B, M]; entries in [0, P)
    positions: jax.Array,  # int32 [B, T]; in [-1, M * page_size)
    *,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:
    """Attention of T new tokens of each of B sequences -> [B, T, N, spec.out_dim] in q's dtype. Softmax in float32."""
    check_rows(q, k_pages, v_pages, block_tables, positions, spec, sinks)
    b, t = positions.shape
    sequences = jnp.repeat(jnp.arange(b, dtype=jnp.int32), t)
    tokens = q.reshape(b * t, *q.shape[2:])
    out = _attend(tokens, k_pages, v_pages, block_tables, sequences, positions.reshape(-1), spec, sinks)
    return out.reshape(b, t, *out.shape[1:])


def ragged_paged_attention(
    q: jax.Array,  # [S, N, H]
    k_pages: Pages,  # [P, K, page_size, H]
    v_pages: Pages | None,  # the same; None where spec.value_dim is not
    block_tables: jax.Array,  # int32 [C, M]
    starts: jax.Array,  # int32 [C]
    lengths: jax.Array,  # int32 [C]
    *,
    spec: AttentionSpec,
    sinks: jax.Array | None = None,  # [N]
) -> jax.Array:
    """The same for C sequences of `lengths` new tokens from positions `starts` on, one after the other in q."""
    check_ragged(q, k_pages, v_pages, block_tables, starts, lengths, spec, sinks)
    sequences, positions = token_places(lengths, len(q)).sequence, token_positions(starts, lengths, len(q))
    return _attend(q, k_pages, v_pages, block_tables, sequences, positions, spec, sinks)


def _attend(q, k_pages, v_pages, block_tables, sequences, positions, spec: AttentionSpec, sinks) -> jax.Array:
    """Of tokens of sequences int32 [S] at `positions` int32 [S], -1 of those that see nothing -> [S, N, V]."""
    if problem := build.unavailable():
        raise RuntimeError(f"{problem}; or use --attention_backend=xla")
    keys, key_scales = values_and_scales(k_pages)
    values, value_scales = (keys, key_scales) if v_pages is None else values_and_scales(v_pages)
    key_scales, value_scales, sinks = (jnp.zeros(0) if x is None else x for x in (key_scales, value_scales, sinks))
    floats = [x.astype(jnp.float32) for x in (key_scales, value_scales, sinks)]
    attend = jax.ffi.ffi_call(
        "jaxinfer_paged_attention", jax.ShapeDtypeStruct((*q.shape[:2], spec.out_dim), jnp.float32)
    )
    numbers = {"scale": np.float32(spec.scale), "window": spec.window or 0, "soft_cap": np.float32(spec.soft_cap or 0)}
    pages, sequences = (keys, values), (block_tables, sequences, positions)
    return attend(q.astype(jnp.float32), *pages, *floats, *sequences, **numbers).astype(q.dtype)
