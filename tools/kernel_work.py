"""What the benchmarks of attention attend over: sequences of given lengths, random, whose pages lie anywhere."""

import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app

from jaxinfer import kv_cache
from jaxinfer.integers import cdiv
from jaxinfer.tools.kernel_timing import Operation, Timer
from pallas_kernels.paged_attention import AttentionSpec, backend, backends
from pallas_kernels.paged_attention.pages import Pages, quantize, values_and_scales

_TURNS = 2  # caches that take turns, so that none is still near the cores when it is read again
_MOST_BYTES = 16 * 2**30


def lengths_of(text: str) -> list[int]:
    """ "2x8" -> [8, 8], "zipf3x9" -> [9, 4, 3]"""
    match = re.fullmatch(r"(zipf)?(\d+)x(\d+)", text)
    if match is None:
        raise app.UsageError(f"{text}: not rows x tokens, such as 64x8192 or zipf64x8192")
    rows, longest = int(match[2]), int(match[3])
    return [max(1, longest // (n + 1)) if match[1] else longest for n in range(rows)]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is attended over.

    Attributes:
      q: [B, 1, N, H] of rows, [S, N, H] of prompts.
      lengths: cached tokens of each sequence, its new ones included.
      turns: (keys, values, block tables) each; pages lie anywhere.
    """

    spec: AttentionSpec
    q: jax.Array
    lengths: list[int]
    turns: list[tuple[Pages, Pages, jax.Array]]

    @classmethod
    def of_rows(cls, spec: AttentionSpec, lengths: list[int], dtype: str) -> "Work":
        return cls._create(spec, lengths, (len(lengths), 1), dtype)

    @classmethod
    def of_prompts(cls, spec: AttentionSpec, lengths: list[int], dtype: str) -> "Work":
        return cls._create(spec, lengths, (sum(lengths),), dtype)

    @classmethod
    def _create(cls, spec: AttentionSpec, lengths: list[int], of_q: tuple[int, ...], dtype: str) -> "Work":
        pages = [cdiv(length, spec.page_size) for length in lengths]
        rng = np.random.default_rng(0)
        turns = []
        for turn in range(_TURNS):
            keys = jax.random.split(jax.random.key(turn), 2)
            shape = (1 + sum(pages), spec.num_kv_heads, spec.page_size, spec.head_dim)
            k_pages, v_pages = (jax.random.normal(key, shape, dtype) for key in keys)
            tables, free = np.zeros((len(pages), max(pages)), np.int32), iter(rng.permutation(sum(pages)) + 1)
            for row, count in enumerate(pages):
                tables[row, :count] = [next(free) for _ in range(count)]
            if spec.cache_dtype is not None:
                of_pages = jax.jit(functools.partial(quantize, dtype=spec.cache_dtype))
                k_pages, v_pages = map(of_pages, (k_pages, v_pages))
            turns.append((k_pages, v_pages, jnp.array(tables)))
        q = jax.random.normal(jax.random.key(_TURNS), (*of_q, spec.num_q_heads, spec.head_dim), dtype)
        return cls(spec, q, lengths, turns)

    @property
    def bytes_read(self) -> int:
        return sum(self.lengths) * self.spec.token_bytes(self.q.dtype.itemsize)

    @property
    def operations(self) -> int:
        """Of both products, where a token meets itself and those before it."""
        pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        return 4 * pairs * self.spec.num_q_heads * self.spec.head_dim

    def backends(self) -> list[str]:
        """That can run this here, in a memory that is not absurd: of long prompts xla gathers whole contexts."""
        tokens, itemsize = self.q.shape[0], self.q.dtype.itemsize
        sizes = {"rows": tokens, "chunks": 1, "chunk_tokens": 1}
        if self.q.ndim == 3:
            sizes = {"rows": 1, "chunks": len(self.lengths), "chunk_tokens": tokens}
        sizes["context_tokens"] = max(self.lengths)

        def can(name: str) -> bool:
            module = backend(name)
            if module.unsupported(self.spec, jax.devices()[0]):
                return False
            return module.workspace_bytes(self.spec, **sizes, itemsize=itemsize) <= _MOST_BYTES

        return [name for name in backends() if can(name)]

    def ours(self, name: str, **settings: Any) -> Operation:
        module = backend(name, self.spec, device=jax.devices()[0])
        lengths = jnp.array(self.lengths, jnp.int32)
        settings["spec"] = self.spec
        if self.q.ndim == 4:
            return lambda q, turn: module.paged_attention(q, *turn, lengths[:, None] - 1, **settings)
        starts = jnp.zeros_like(lengths)
        return lambda q, turn: module.ragged_paged_attention(q, *turn, starts, lengths, **settings)

    def write_timer(self, num_calls: int) -> Timer:
        """Of each row's last token into both pools, which a step does before it attends."""
        k_pages, v_pages, tables = self.turns[0]
        last = jnp.array(self.lengths, jnp.int32) - 1
        page_ids = tables[jnp.arange(len(last)), last // self.spec.page_size]
        new = jax.random.normal(
            jax.random.key(0), (len(last), self.spec.num_kv_heads, self.spec.head_dim), self.q.dtype
        )

        def write(pools: tuple[Pages, ...], new: jax.Array) -> tuple[Pages, ...]:
            return tuple(kv_cache.write(pages, new, page_ids, last) for pages in pools)

        return Timer(write, (k_pages, v_pages), [new], num_calls, is_update=True)

    @functools.cached_property
    def expected(self) -> np.ndarray:
        """Of the first sequence's last token, [N, H], in float64."""
        k_pages, v_pages, tables = self.turns[0]
        length, last = self.lengths[0], self.q[0, 0] if self.q.ndim == 4 else self.q[self.lengths[0] - 1]
        of_kv_head = np.asarray(last, np.float64).reshape(self.spec.num_kv_heads, -1, self.spec.head_dim)
        of_token = (self.spec.num_kv_heads, self.spec.head_dim)
        keys, values = (
            numbers(jax.tree.map(lambda x: x[tables[0]], pages)).swapaxes(1, 2).reshape(-1, *of_token)[:length]
            for pages in (k_pages, v_pages)
        )
        scores = np.einsum("kgh,skh->kgs", of_kv_head, keys) * self.spec.scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("kgs,skh->kgh", weights / weights.sum(axis=-1, keepdims=True), values)
        return out.reshape(self.spec.num_q_heads, -1)

    def error(self, out: jax.Array) -> float:
        """Largest, relative to the largest number, of what was computed in the first turn."""
        last = np.asarray(out[0, 0] if self.q.ndim == 4 else out[self.lengths[0] - 1], np.float64)
        return float(np.abs(last - self.expected).max() / np.abs(self.expected).max())


def numbers(pages: Pages) -> np.ndarray:
    """In float64."""
    values, scales = values_and_scales(pages)
    values = np.asarray(values, np.float64)
    return values if scales is None else values * np.asarray(scales, np.float64)[..., None]
