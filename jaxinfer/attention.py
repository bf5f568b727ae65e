"""What a model attends to: nothing but its own tokens (training), or a paged cache (inference)."""

from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import kv_cache
from jaxinfer.config import ModelConfig
from jaxinfer.kv_cache import Cache
from jaxinfer.partitioning import Partitioner, num_sharded_kv_heads
from pallas_kernels.paged_attention import AttentionSpec
from pallas_kernels.precision import matmul_precision
from sharding_rules import axes as ax


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Every token attends to itself and those before it; no cache.

    q [B, T, N, H], k and v [B, T, K, H] with N a multiple of K -> [B, T, N, H]. Softmax in float32.
    Two batched einsums: on XLA:CPU faster than `jax.nn.dot_product_attention`.
    """
    b, t, n, h = q.shape
    num_kv_heads = k.shape[2]
    q = (q * jnp.asarray(scale, q.dtype)).reshape(b, t, num_kv_heads, n // num_kv_heads, h)
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision).reshape(b, t, n, h)


def attention_spec(config: ModelConfig, partitioner: Partitioner, page_size: int) -> AttentionSpec:
    """What the attention of one device's shard computes."""
    return AttentionSpec(
        num_q_heads=config.num_q_heads // partitioner.num_shards(ax.HEADS),
        num_kv_heads=num_sharded_kv_heads(config.num_kv_heads, partitioner) // partitioner.num_shards(ax.KV_HEADS),
        head_dim=config.head_dim,
        page_size=page_size,
        scale=config.softmax_scale,
    )


class Segment(NamedTuple):
    """Sequences with equally many new tokens each: B of them in one data shard, T tokens, M pages; D shards."""

    block_tables: jax.Array  # int32 [D, B, M]; page ids local to the shard
    positions: jax.Array  # int32 [D, B, T] of the new tokens
    valid: jax.Array  # bool [D, B, T]; false for padding


class PagedAttention:
    """The `attend` of one step: writes the new tokens into the cache, then attends over their pages.

    The model sees each shard's tokens in a row, [D, S, ...]; here they are the segments again, one after the other.

    An object of the trace: each layer's call replaces that layer's arrays in `cache`, which the step returns.
    All work happens on the local shard (`shard_map`): left to itself XLA would gather every page to every
    device, because it cannot know that block tables only name pages of their own shard.
    """

    def __init__(
        self,
        cache: Cache,
        segments: Sequence[Segment],
        *,
        spec: AttentionSpec,  # heads of one shard
        backend: ModuleType,
        partitioner: Partitioner,
    ):
        self._cache = list(cache)
        self._segments = tuple(segments)
        self._spec, self._backend, self._partitioner = spec, backend, partitioner

    @property
    def cache(self) -> Cache:
        return tuple(self._cache)

    def __call__(self, layer: int, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """q [D, S, N, H], k and v [D, S, K, H] -> [D, S, N, H]."""
        attend = self._attend_local
        if self._partitioner.mesh.size > 1:
            pages = self._partitioner.spec(kv_cache.CACHE_AXES)
            heads = self._partitioner.spec((ax.BATCH, None, ax.HEADS, ax.HEAD_DIM))
            kv_heads = self._partitioner.spec((ax.BATCH, None, ax.KV_HEADS, ax.HEAD_DIM))
            rows = self._partitioner.spec((ax.BATCH, None, None))
            attend = jax.shard_map(
                attend,
                mesh=self._partitioner.mesh,
                in_specs=(heads, kv_heads, kv_heads, pages, pages, rows),
                out_specs=(heads, pages, pages),
                check_vma=False,
            )
        k_pages, v_pages = self._cache[layer]
        out, k_pages, v_pages = attend(q, k, v, k_pages, v_pages, self._segments)
        self._cache[layer] = (k_pages, v_pages)
        return out

    def _attend_local(self, q, k, v, k_pages, v_pages, segments: tuple[Segment, ...]):
        """Of one shard: the first dimension is 1. All is written before anything is read: pages stay in place."""
        segments = tuple(Segment(*(x[0] for x in segment)) for segment in segments)
        sizes = [segment.positions.size for segment in segments]
        starts = [sum(sizes[:i]) for i in range(len(sizes))]

        def rows(x: jax.Array, i: int) -> jax.Array:
            return x[0, starts[i] : starts[i] + sizes[i]].reshape(*segments[i].positions.shape, *x.shape[2:])

        with jax.named_scope("cache_write"):
            for i, (block_tables, positions, valid) in enumerate(segments):
                k_pages = kv_cache.write(k_pages, rows(k, i), block_tables, positions, valid)
                v_pages = kv_cache.write(v_pages, rows(v, i), block_tables, positions, valid)
        outs = [
            self._backend.paged_attention(rows(q, i), k_pages, v_pages, block_tables, positions, spec=self._spec)
            for i, (block_tables, positions, _) in enumerate(segments)
        ]
        return jnp.concatenate([out.reshape(-1, *q.shape[2:]) for out in outs])[None], k_pages, v_pages
