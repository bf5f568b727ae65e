"""Attention over a paged cache. A backend is a module in this folder with

- `unsupported(spec: AttentionSpec) -> str | None`: why it cannot run `spec`, or None if it can;
- `paged_attention(q, k_pages, v_pages, block_tables, positions, *, spec, sinks) -> out`, as `xla.py` documents it;
- `ragged_paged_attention(q, k_pages, v_pages, block_tables, starts, lengths, *, spec, sinks) -> out`, likewise;

and, unless it says of every spec with a `context_size` above 1 that it cannot,

- `partial_paged_attention(q, k_pages, v_pages, block_tables, columns, positions, *, spec) -> PartialSoftmax`: over a
  device's own pages, which lie anywhere in a sequence: page block_tables[b, i] has tokens at columns[b, i] * page_size;
- `ragged_partial_paged_attention(q, k_pages, v_pages, block_tables, columns, starts, lengths, *, spec)`, likewise.
"""

import importlib
import pkgutil
from types import ModuleType

from pallas_kernels.paged_attention.partial import PartialSoftmax, merge
from pallas_kernels.paged_attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "PartialSoftmax", "backend", "backends", "merge"]

_NOT_BACKENDS = ("blocks", "partial", "ragged", "spec")


def backends() -> list[str]:
    """Names of all backends, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_BACKENDS)


def backend(name: str, *specs: AttentionSpec) -> ModuleType:
    """The backend called `name`; ValueError if there is none, or if it cannot run one of `specs`, saying why."""
    if name not in backends():
        raise ValueError(f"--attention_backend={name}: no such backend; known: {', '.join(backends())}")
    module = importlib.import_module(f"{__name__}.{name}")
    for reason in map(module.unsupported, specs):
        if reason:
            raise ValueError(f"--attention_backend={name}: {reason}")
    return module
