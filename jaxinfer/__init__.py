"""Large language model inference on many devices, in JAX and Flax.

from jaxinfer import Engine, SamplingParams
Engine().generate("Once upon a time", SamplingParams(temperature=0.7, max_tokens=64))
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxinfer.async_engine import AsyncEngine
    from jaxinfer.engine import Engine
    from jaxinfer.sampling_params import SamplingParams

__all__ = ["AsyncEngine", "Engine", "SamplingParams"]

_MODULES = {
    "AsyncEngine": "jaxinfer.async_engine",
    "Engine": "jaxinfer.engine",
    "SamplingParams": "jaxinfer.sampling_params",
}


def __getattr__(name: str) -> Any:
    """Imports on first use: the number of virtual devices can only be chosen before jax is imported."""
    if name not in _MODULES:
        raise AttributeError(f"module 'jaxinfer' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
