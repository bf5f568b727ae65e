"""Others' attention kernels, where they are installed and can run on the device that jax uses."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from jaxinfer.tools.kernel_timing import Operation
from pallas_kernels.paged_attention import AttentionSpec

Turns = list[Any]
_COLUMNS = 128  # of block tables, by which JAX's kernel wants to divide them
_BLOCK_TOKENS = 256  # that it reads at once: twice as many do not fit into an H100's shared memory


def find(spec: AttentionSpec, is_decode: bool, lengths: list[int], turns: Turns) -> dict[str, tuple[Operation, Turns]]:
    """By name, what attends over the same, and what it is given instead of `turns`.

    Nothing on a CPU, or over a quantised cache.
    """
    if jax.default_backend() != "gpu" or spec.cache_dtype is not None:
        return {}
    if is_decode:
        return {"jax.experimental.pallas": _jax_paged(spec, lengths, turns)}
    return {"cudnn, contiguous": _cudnn(spec, lengths, turns)} if len(set(lengths)) == 1 else {}


def _jax_paged(spec: AttentionSpec, lengths: list[int], turns: Turns) -> tuple[Operation, Turns]:
    """A pool for each KV head, and queries that are scaled before."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        from jax.experimental.pallas.ops.gpu.paged_attention import paged_attention
    seen, pages = jnp.array(lengths, jnp.int32), max(1, _BLOCK_TOKENS // spec.page_size)

    def attend(q: jax.Array, turn: Any) -> jax.Array:
        return paged_attention(q[:, 0] * spec.scale, *turn, seen, pages_per_compute_block=pages)[:, None]

    def padded(tables: jax.Array) -> jax.Array:
        return jnp.pad(tables, ((0, 0), (0, -tables.shape[1] % _COLUMNS)))

    return attend, [(k.swapaxes(0, 1), v.swapaxes(0, 1), padded(tables)) for k, v, tables in turns]


def _cudnn(spec: AttentionSpec, lengths: list[int], turns: Turns) -> tuple[Operation, Turns]:
    """Sequences one after the other, [B, S, K, H], all as long."""

    def attend(q: jax.Array, turn: Any) -> jax.Array:
        new = q.reshape(len(lengths), lengths[0], *q.shape[1:])
        out = jax.nn.dot_product_attention(new, *turn, is_causal=True, scale=spec.scale, implementation="cudnn")
        return out.reshape(q.shape)

    def contiguous(pages: jax.Array, tables: jax.Array) -> jax.Array:
        whole = pages[tables].swapaxes(2, 3)
        return whole.reshape(len(lengths), -1, *whole.shape[3:])[:, : lengths[0]]

    return attend, [(contiguous(k, tables), contiguous(v, tables)) for k, v, tables in turns]
