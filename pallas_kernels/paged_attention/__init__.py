"""Attention over a paged cache. A backend is a module in this folder with

- `unsupported(spec: AttentionSpec, device: jax.Device | None) -> str | None`: why it cannot run `spec` there, or None
  if it can; without a device, why it cannot anywhere;
- `unreachable_pages(spec) -> range`: as many as these in an array it cannot read, though it can fewer or more;
- `workspace_bytes(spec, *, rows, chunks, chunk_tokens, context_tokens, itemsize) -> int`, as `xla.py` has it;
- `paged_attention(q, k_pages, v_pages, block_tables, positions, *, spec, sinks) -> out`, as `xla.py` documents it;
- `ragged_paged_attention(q, k_pages, v_pages, block_tables, starts, lengths, *, spec, sinks) -> out`, likewise;

and, unless it says of every spec with a `context_size` above 1 that it cannot,

- `partial_paged_attention(q, k_pages, v_pages, block_tables, columns, positions, *, spec) -> PartialSoftmax`: over a
  device's own pages, which lie anywhere in a sequence: page block_tables[b, i] has tokens at columns[b, i] * page_size;
- `ragged_partial_paged_attention(q, k_pages, v_pages, block_tables, columns, starts, lengths, *, spec)`, likewise.
"""

from pallas_kernels.backends import Backends, Choice
from pallas_kernels.paged_attention.partial import PartialSoftmax, merge
from pallas_kernels.paged_attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "Choice", "PartialSoftmax", "backend", "backends", "choose", "merge", "resolve"]

_PARTS = ("blocks", "checks", "pages", "partial", "ragged", "spec", "tiling", "work_list")
_BACKENDS = Backends(__name__, "attention_backend", _PARTS)
backends, backend, choose, resolve = _BACKENDS.names, _BACKENDS.load, _BACKENDS.choose, _BACKENDS.resolve
