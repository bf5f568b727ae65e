"""Attention over a paged cache. A backend is a module in this folder with

- `unsupported(spec: AttentionSpec, device: jax.Device | None) -> str | None`: why it cannot run `spec` there, or None
  if it can; without a device, why it cannot anywhere;
- `workspace_bytes(spec, *, rows, chunks, chunk_tokens, context_tokens, itemsize) -> int`, as `xla.py` has it;
- `paged_attention(q, k_pages, v_pages, block_tables, positions, *, spec, sinks) -> out`, as `xla.py` documents it;
- `ragged_paged_attention(q, k_pages, v_pages, block_tables, starts, lengths, *, spec, sinks) -> out`, likewise;

and, unless it says of every spec with a `context_size` above 1 that it cannot,

- `partial_paged_attention(q, k_pages, v_pages, block_tables, columns, positions, *, spec) -> PartialSoftmax`: over a
  device's own pages, which lie anywhere in a sequence: page block_tables[b, i] has tokens at columns[b, i] * page_size;
- `ragged_partial_paged_attention(q, k_pages, v_pages, block_tables, columns, starts, lengths, *, spec)`, likewise.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import jax

from pallas_kernels.paged_attention.partial import PartialSoftmax, merge
from pallas_kernels.paged_attention.spec import AttentionSpec

__all__ = ["AttentionSpec", "Choice", "PartialSoftmax", "backend", "backends", "choose", "merge"]

_NOT_BACKENDS = """
    blocks checks pages partial ragged spec tiling triton_kernel triton_tuning work_list
""".split()
_FASTEST_FIRST = {"gpu": ("triton",)}  # by platform, but for xla, which can run anything


def backends() -> list[str]:
    """Names of all backends, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _NOT_BACKENDS)


def backend(name: str, *specs: AttentionSpec, device: jax.Device | None = None) -> ModuleType:
    """The backend called `name`; ValueError if there is none, or if it cannot run one of `specs`, saying why."""
    if name not in backends():
        raise ValueError(f"--attention_backend={name}: no such backend; known: auto, {', '.join(backends())}")
    module = importlib.import_module(f"{__name__}.{name}")
    if reason := _why_not(module, specs, device):
        raise ValueError(f"--attention_backend={name}: {reason}")
    return module


class Choice(NamedTuple):
    """A backend, and of each that would have been faster why it cannot."""

    name: str
    passed_over: dict[str, str]

    def __str__(self) -> str:
        reasons = "; ".join(f"{name} cannot: {reason}" for name, reason in self.passed_over.items())
        return f"{self.name} ({reasons})" if reasons else self.name


def choose(specs: Iterable[AttentionSpec], device: jax.Device) -> Choice:
    """The fastest backend for `device` that can run all `specs`."""
    specs, passed_over = tuple(specs), {}
    for name in _FASTEST_FIRST.get(device.platform, ()):
        reason = _why_not(importlib.import_module(f"{__name__}.{name}"), specs, device)
        if reason is None:
            return Choice(name, passed_over)
        passed_over[name] = reason
    return Choice("xla", passed_over)


def _why_not(module: ModuleType, specs: Iterable[AttentionSpec], device: jax.Device | None) -> str | None:
    return next(filter(None, (module.unsupported(spec, device) for spec in specs)), None)
