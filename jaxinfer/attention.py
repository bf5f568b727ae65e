"""What a model attends to: nothing but its own tokens (training, encoders), or a paged cache (decoding)."""

import dataclasses
import functools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxinfer import kv_cache
from jaxinfer.config import ModelConfig
from jaxinfer.context_parallel import own_page, own_pages
from jaxinfer.kv_cache import Cache
from jaxinfer.layouts import AxisSplits, num_sharded_kv_heads
from jaxinfer.partitioning import Partitioner
from jaxinfer.pipeline import on_stage
from jaxinfer.stages import StagePlan
from pallas_kernels.paged_attention import AttentionSpec, merge
from pallas_kernels.precision import matmul_precision
from pallas_kernels.ragged import token_places
from sharding_rules import axes as ax


def causal_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> jax.Array:
    """Every token attends to itself and those before it; no cache.

    q [B, T, N, H], k and v [B, T, K, H] with N a multiple of K -> [B, T, N, H].
    """
    t = q.shape[1]
    return masked_attention(q, k, v, scale, jnp.tril(jnp.ones((t, t), bool)))


def bidirectional_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, lengths: jax.Array) -> jax.Array:
    """Every token attends to all tokens of its sequence, whose `lengths` int32 [B] are at least 1; no cache.

    Shapes as of `causal_attention`. What comes out for a token beyond its sequence counts for nothing.
    """
    is_valid = jnp.arange(q.shape[1]) < lengths[:, None]
    return masked_attention(q, k, v, scale, is_valid[:, None, None, None, :])


def masked_attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, mask: jax.Array) -> jax.Array:
    """Attention where `mask`, bool and broadcast to [B, K, N / K, T, T], is true. Softmax in float32.

    Two batched einsums: on XLA:CPU faster than `jax.nn.dot_product_attention`.
    """
    b, t, n, h = q.shape
    num_kv_heads = k.shape[2]
    q = (q.astype(jnp.float32) * scale).astype(q.dtype).reshape(b, t, num_kv_heads, n // num_kv_heads, h)
    precision = matmul_precision(q.dtype)
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, precision=precision, preferred_element_type=jnp.float32)
    scores = jnp.where(mask, scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v, precision=precision).reshape(b, t, n, h)


SlotSpecs = tuple[AttentionSpec, ...]  # of a slot for layers on each stage, as `stages` has it; most are all the same


def attention_specs(
    config: ModelConfig, splits: AxisSplits, page_size: int, cache_dtype: str | None = None
) -> tuple[SlotSpecs, ...]:
    """What the attention of each slot computes on one device's shard. Layers differ by their windows."""
    spec = AttentionSpec(
        num_q_heads=config.num_q_heads // splits.num_shards(ax.HEADS),
        num_kv_heads=num_sharded_kv_heads(config.num_kv_heads, splits) // splits.num_shards(ax.KV_HEADS),
        head_dim=config.head_dim,
        page_size=page_size,
        scale=config.softmax_scale,
        soft_cap=config.attention_soft_cap,
        value_dim=None if config.latent is None else config.latent.kv_rank,
        cache_dtype=cache_dtype,
        context_size=splits.context_size,
        device_kind=splits.device_kind,
    )
    plan = StagePlan.create(config.num_layers, splits.axis_size(ax.STAGE))
    layers = map(plan.like, range(len(plan.slots)))
    return tuple(tuple(dataclasses.replace(spec, window=config.window(n)) for n in of_slot) for of_slot in layers)


class Rows(NamedTuple):
    """B sequences with one new token each, in each of D data shards; block tables of M pages."""

    block_tables: jax.Array  # int32 [D, B, M]; page ids local to the shard
    positions: jax.Array  # int32 [D, B] of the new tokens
    valid: jax.Array  # bool [D, B]; false for padding


class Prompts(NamedTuple):
    """C sequences with any number of new tokens each, which follow each other in a shard's tokens."""

    block_tables: jax.Array  # int32 [D, C, M]
    starts: jax.Array  # int32 [D, C]; position of the first new token
    lengths: jax.Array  # int32 [D, C]; new tokens; 0 for padding


class PagedAttention:
    """The `attend` of one step: writes the new tokens into the cache, then attends over their pages.

    The model sees each shard's tokens in a row, [D, S, ...]: those of `rows`, then those of `prompts`, then padding.

    An object of the trace: each layer's call replaces that layer's arrays in `cache`, which the step returns.
    All work happens on the local shard (`shard_map`): left to itself XLA would gather every page to every
    device, because it cannot know that block tables only name pages of their own shard. Where a sequence's pages are
    spread over several devices, all of these have its tokens; each writes those that fall on its own pages, attends
    over these pages, and what comes out is merged.
    """

    def __init__(
        self,
        cache: Cache,
        rows: Rows | None,
        prompts: Prompts | None,
        *,
        specs: Sequence[SlotSpecs],
        backend: ModuleType,
        partitioner: Partitioner,
    ):
        self._cache = list(cache)
        self._rows, self._prompts = rows, prompts
        self._specs, self._backend, self._partitioner = specs, backend, partitioner

    @property
    def cache(self) -> Cache:
        return tuple(self._cache)

    def __call__(
        self, slot: int, q: jax.Array, k: jax.Array, v: jax.Array | None, *, sinks: jax.Array | None = None
    ) -> jax.Array:
        """q [D, S, N, H], k and v [D, S, K, H], sinks [N] -> [D, S, N, H]; no v where values are in k."""
        spec = self._partitioner.spec
        heads, kv_heads = (spec((ax.BATCH, None, axis, ax.HEAD_DIM)) for axis in (ax.HEADS, ax.KV_HEADS))
        sequences, of_heads = spec((ax.BATCH,)), spec((ax.HEADS,))
        pages = spec(kv_cache.PAGE_AXES[:2])  # of scales too, which have no head_dim; nothing splits what follows
        attend = self._partitioner.shard_map(
            functools.partial(self._attend_local, self._specs[slot]),
            in_specs=(heads, kv_heads, pages, sequences, of_heads),
            out_specs=(heads, pages),
        )
        out, self._cache[slot] = attend(q, (k, v), self._cache[slot], (self._rows, self._prompts), sinks)
        return out

    def _attend_local(self, specs: SlotSpecs, q, new, pages, sequences: tuple[Rows | None, Prompts | None], sinks):
        """Of one shard: the first dimension is 1. All is written before anything is read: pages stay in place."""
        q, new, (rows, prompts) = jax.tree.map(lambda x: x[0], (q, new, sequences))
        num_rows, page_size = 0 if rows is None else rows.positions.size, specs[0].page_size
        with jax.named_scope("cache_write"):
            if rows is not None:
                columns = rows.positions[:, None] // page_size
                page_ids = jnp.take_along_axis(rows.block_tables, columns, axis=1, mode="clip")[:, 0]
                where = (self._page_to_write(page_ids, rows.valid), rows.positions)
                pages = jax.tree.map(lambda x, p: kv_cache.write(p, x[:num_rows], *where), new, pages)
            if prompts is not None:
                place = token_places(prompts.lengths, q.shape[0] - num_rows)
                positions = prompts.starts[place.sequence] + place.offset
                columns = positions // page_size
                page_ids = prompts.block_tables.at[place.sequence, columns].get(mode="clip")
                where = (self._page_to_write(page_ids, place.valid), positions)
                pages = jax.tree.map(lambda x, p: kv_cache.write(p, x[num_rows:], *where), new, pages)

        def read(spec: AttentionSpec) -> jax.Array:
            of_context = self._read if spec.context_size == 1 else self._read_parts
            return of_context(spec, q, pages, rows, prompts, sinks)[None]

        return on_stage(read, specs), pages

    def _read(self, spec: AttentionSpec, q, pages, rows: Rows | None, prompts: Prompts | None, sinks) -> jax.Array:
        """q [S, N, H] -> [S, N, H]."""
        num_rows, outs = 0 if rows is None else rows.positions.size, []
        if rows is not None:
            of_rows = (rows.block_tables, _positions(rows))
            out = self._backend.paged_attention(q[:num_rows, None], *pages, *of_rows, spec=spec, sinks=sinks)
            outs.append(out[:, 0])
        if prompts is not None:
            of_prompts = self._backend.ragged_paged_attention
            outs.append(of_prompts(q[num_rows:], *pages, *prompts, spec=spec, sinks=sinks))
        return jnp.concatenate(outs)

    def _read_parts(
        self, spec: AttentionSpec, q, pages, rows: Rows | None, prompts: Prompts | None, sinks
    ) -> jax.Array:
        """The same of the device's own pages, and then of all. Rows and prompts are merged at once."""
        axis_names = self._partitioner.context_axes
        num_rows, parts = 0 if rows is None else rows.positions.size, []
        if rows is not None:
            of_rows = (*own_pages(rows.block_tables, axis_names), _positions(rows))
            part = self._backend.partial_paged_attention(q[:num_rows, None], *pages, *of_rows, spec=spec)
            parts.append(jax.tree.map(lambda x: x[:, 0], part))
        if prompts is not None:
            of_prompts = (*own_pages(prompts.block_tables, axis_names), prompts.starts, prompts.lengths)
            parts.append(self._backend.ragged_partial_paged_attention(q[num_rows:], *pages, *of_prompts, spec=spec))
        with jax.named_scope("merge"):
            part = jax.tree.map(lambda *of_both: jnp.concatenate(of_both), *parts)
            return merge(part, axis_names, sinks, q.dtype)

    def _page_to_write(self, page_ids: jax.Array, valid: jax.Array) -> jax.Array:
        """The scratch page, 0, for what is not valid, or not on this device."""
        axis_names = self._partitioner.context_axes
        return own_page(page_ids, valid, axis_names) if axis_names else jnp.where(valid, page_ids, 0)


def _positions(rows: Rows) -> jax.Array:
    """As attention wants them: int32 [B, 1], -1 for padding."""
    return jnp.where(rows.valid, rows.positions, -1)[:, None]
