"""Model families: one file each, found by name.

A family module has

- `ARCHITECTURES`: the names in config.json's `architectures` that it runs;
- `parse_config(hf: HFConfig) -> ModelConfig`;
- `Model`: the `nnx.Module`, built as `Model(config, partitioner, dtype=, rngs=)`;
- `weight_names(config) -> WeightNames`: the checkpoint tensor of each parameter;
- `TINY_CONFIGS`: config.json dictionaries of a few small models, by name, for the generic tests. The one called
  "gqa" divides over eight devices.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Protocol

import jax

from jaxinfer.layers.attention_block import Attend


class Decoder(Protocol):
    """What the engine asks of a family's `Model`."""

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """tokens, positions int32 [B, T] -> normalised activations [B, T, D]."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        ...


def families() -> list[str]:
    """Names of all families, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def get(family: str) -> ModuleType:
    """The module of a family that `families` lists."""
    return importlib.import_module(f"{__name__}.{family}")


def for_architecture(architecture: str) -> ModuleType:
    """The family that runs config.json's `architecture`; ValueError listing the known ones if none does."""
    known = {name: family for family in families() for name in get(family).ARCHITECTURES}
    if architecture not in known:
        raise ValueError(
            f"config.json: architecture {architecture!r} is not supported; known: {', '.join(sorted(known))}"
        )
    return get(known[architecture])
