"""Model families: one file each, found by name.

A family module has

- `ARCHITECTURES`: the names in config.json's `architectures` that it runs;
- `IS_ENCODER`: True for an encoder, whose `Model` is an `Encoder` below; a decoder's is a `Decoder`, and has none;
- `parse_config(hf: HFConfig) -> ModelConfig`, or `EncoderConfig` of an encoder;
- `Model`: the `nnx.Module`, built as `Model(config, partitioner, dtype=, rngs=)`;
- `weight_names(config) -> WeightNames`: the checkpoint tensor of each parameter;
- `unused_tensors(config, names: Collection[str]) -> set[str]`, if files may have tensors that inference does not need:
  those among `names`;
- `PREFIX`, if some files leave it out: what the names of all other files' tensors begin with;
- `TINY_CONFIGS`: config.json dictionaries of a few small models, by name, for the generic tests. The first divides
  over eight devices.
"""

import importlib
import pkgutil
from types import ModuleType
from typing import Protocol

import jax

from jaxinfer.layers.attention_block import Attend
from jaxinfer.layers.moe import Routing


class Decoder(Protocol):
    """What the engine asks of the `Model` of a family that generates."""

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """tokens, positions int32 [B, T] -> normalised activations [B, T, D]: what follows, one after the other."""
        ...

    def embed(self, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        """tokens, positions int32 [B, T] -> [B, T, D]."""
        ...

    def run_layers(
        self, x: jax.Array, positions: jax.Array, attend: Attend, routing: Routing | None = None
    ) -> jax.Array:
        """x [B, T, D], positions int32 [B, T] -> [B, T, D]; of a pipeline the layers of this device's stage.

        Only a model with experts is given `routing`.
        """
        ...

    def finish(self, x: jax.Array) -> jax.Array:
        """[B, T, D] behind the last layer -> the same, normalised."""
        ...

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        ...


class Encoder(Protocol):
    """What the engine asks of the `Model` of a family that gives embeddings."""

    def __call__(self, tokens: jax.Array, lengths: jax.Array) -> jax.Array:
        """tokens int32 [B, T], of each row the first `lengths` int32 [B] >= 1 -> activations [B, T, D]."""
        ...


def families() -> list[str]:
    """Names of all families, sorted."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def decoders() -> list[str]:
    """Those of `families` that generate."""
    return [family for family in families() if not is_encoder(get(family))]


def encoders() -> list[str]:
    """Those of `families` that give embeddings."""
    return [family for family in families() if is_encoder(get(family))]


def is_encoder(module: ModuleType) -> bool:
    return getattr(module, "IS_ENCODER", False)


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
