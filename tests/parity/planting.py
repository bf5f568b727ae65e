"""Ways to plant a mistake: in the model's numbers, in its weights, in a function. Each is undone with its patch."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest

from jaxinfer.config import ModelConfig, MoEConfig, RopeConfig
from pallas_kernels.paged_attention import xla
from tests.parity import driver

Plant = Callable[[pytest.MonkeyPatch], None]


@dataclasses.dataclass(frozen=True)
class Fault:
    """One mistake.

    Attributes:
      name: what is wrong.
      plant: puts it in; undone with the patch.
      family, config: the tiny model that has what is broken.
      needs_long_prompt: no position of the 4-token prompt and its 64 tokens shows it.
      decodes: it is in how tokens are decoded one by one, and none that is prefilled shows it.
    """

    name: str
    plant: Plant
    config: str = "gqa"
    family: str = "llama"
    needs_long_prompt: bool = False
    decodes: bool = False

    def __str__(self) -> str:
        return self.name.replace(" ", "_")


def wrap(module, name: str, make: Callable) -> Plant:
    """Replaces `module.name` by `make(original)`."""
    return lambda patch: patch.setattr(module, name, make(getattr(module, name)))


def of_config(change: Callable[[ModelConfig], dict]) -> Plant:
    def misread(read: Callable) -> Callable:
        return lambda model_dir: (lambda config: dataclasses.replace(config, **change(config)))(read(model_dir))

    return wrap(driver, "read_config", misread)


def of_moe(change: Callable[[MoEConfig], dict]) -> Plant:
    return of_config(lambda c: {"moe": c.moe and dataclasses.replace(c.moe, **change(c.moe))})


def of_rope(change: Callable[[RopeConfig], dict]) -> Plant:
    def changed(config: ModelConfig) -> dict:
        assert config.rope is not None
        return {"rope": dataclasses.replace(config.rope, **change(config.rope))}

    return of_config(changed)


def of_weights(change: Callable[[str, jax.Array], jax.Array]) -> Plant:
    def misload(load: Callable) -> Callable:
        def load_changed(model_dir, definition):
            arrays = load(model_dir, definition)
            return tuple(change(spec.path, a) for spec, a in zip(definition.params, arrays, strict=True))

        return load_changed

    return wrap(driver, "load_weights", misload)


def zeros_at(*parts: str) -> Plant:
    """The parameters whose path has all of `parts` are zero."""
    return of_weights(lambda path, a: jnp.zeros_like(a) if all(part in path for part in parts) else a)


def of_attention(change: Callable) -> Plant:
    """`change(attend, q, positions)` instead of the attention over pages."""

    def make(attention: Callable) -> Callable:
        def changed(q, k_pages, v_pages, block_tables, positions, **of_layer):
            attend = lambda q, positions: attention(q, k_pages, v_pages, block_tables, positions, **of_layer)  # noqa: E731
            return change(attend, q, positions)

        return changed

    return wrap(xla, "paged_attention", make)
