"""Paged attention in plain JAX: the reference for every backend, and the default on CPU.

For sequence b, query t at position p = positions[b, t], and query head n reading KV head k = n // group_size:

    key[j]   = k_pages[block_tables[b, j // page_size], k, j % page_size]      (value[j] likewise)
    score[j] = scale * <q[b, t, n], key[j]>          for j <= p, else -inf
    out      = sum_j softmax(score)[j] * value[j]

so a query sees the cached tokens up to and including its own, which must have been written before. Pages
beyond a sequence's last token may hold anything, NaN included: what is masked is never multiplied.

The gather reads `block_tables.shape[1]` pages per sequence whatever its length. The caller passes only as many
columns as the longest sequence uses, rounded up to a bucket.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.paged_attention.spec import AttentionSpec
from pallas_kernels.precision import matmul_precision


def unsupported(spec: AttentionSpec) -> str | None:
    """Nothing is: every spec runs on every platform."""
    del spec
    return None


def paged_attention(
    q: jax.Array,  # [B, T, N, H]
    k_pages: jax.Array,  # [P, K, page_size, H]
    v_pages: jax.Array,  # [P, K, page_size, H]
    block_tables: jax.Array,  # int32 [B, M]; entries in [0, P)
    positions: jax.Array,  # int32 [B, T]; in [0, M * page_size)
    *,
    spec: AttentionSpec,
) -> jax.Array:
    """Attention of T new tokens of each of B sequences -> [B, T, N, H] in q's dtype. Softmax in float32."""
    _check(q, k_pages, v_pages, block_tables, positions, spec)
    b, t = positions.shape
    num_kv_heads, group, head_dim = spec.num_kv_heads, spec.group_size, spec.head_dim
    keys, values = (_gather(pages, block_tables) for pages in (k_pages, v_pages))
    cached = jnp.arange(keys.shape[2], dtype=jnp.int32)
    visible = cached <= positions[..., None]  # [B, T, S]
    readable = (
        cached <= jnp.max(positions, axis=1)[:, None]
    )  # [B, S]; the rest may be stale, so 0 * NaN must not happen
    values = jnp.where(readable[:, None, :, None], values, jnp.zeros((), values.dtype))

    precision = matmul_precision(q.dtype)
    grouped = (q * jnp.asarray(spec.scale, q.dtype)).reshape(b, t, num_kv_heads, group, head_dim)
    scores = jnp.einsum("btkgh,bksh->bkgts", grouped, keys, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(visible[:, None, None], scores, jnp.float32(-jnp.inf))
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    # XLA:CPU multiplies bfloat16 into float32 only where the result keeps the order of the operands.
    out = jnp.einsum("bkgts,bksh->bkgth", weights, values, precision=precision, preferred_element_type=jnp.float32)
    return out.astype(q.dtype).transpose(0, 3, 1, 2, 4).reshape(q.shape)


def _gather(pages: jax.Array, block_tables: jax.Array) -> jax.Array:
    """[P, K, page_size, H], int32 [B, M] -> [B, K, M * page_size, H].

    Gathers (page, head) tiles straight into the order that the matrix products want.
    """
    num_pages, num_kv_heads, page_size, head_dim = pages.shape
    b, m = block_tables.shape
    heads = jnp.arange(num_kv_heads, dtype=jnp.int32)
    tiles = block_tables[:, None, :] * num_kv_heads + heads[:, None]  # [B, K, M]
    gathered = pages.reshape(num_pages * num_kv_heads, page_size, head_dim)[tiles]
    return gathered.reshape(b, num_kv_heads, m * page_size, head_dim)


def _check(q, k_pages, v_pages, block_tables, positions, spec: AttentionSpec) -> None:
    b, t = positions.shape
    if q.shape != (b, t, spec.num_q_heads, spec.head_dim):
        raise ValueError(f"q has shape {q.shape}; expected {(b, t, spec.num_q_heads, spec.head_dim)} for {spec}")
    page_shape = (spec.num_kv_heads, spec.page_size, spec.head_dim)
    for name, pages in (("k_pages", k_pages), ("v_pages", v_pages)):
        if pages.shape[1:] != page_shape or pages.shape != k_pages.shape:
            raise ValueError(f"{name} has shape {pages.shape}; expected (num_pages, *{page_shape}) for {spec}")
        if pages.dtype != q.dtype:
            raise ValueError(f"{name} is {pages.dtype}, q is {q.dtype}; they must be the same")
    if block_tables.ndim != 2 or block_tables.shape[0] != b:
        raise ValueError(f"block_tables has shape {block_tables.shape}; expected ({b}, pages per sequence)")
    for name, ids in (("block_tables", block_tables), ("positions", positions)):
        if ids.dtype != jnp.int32:
            raise ValueError(f"{name} is {ids.dtype}; expected int32")
