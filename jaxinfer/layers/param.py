"""Parameters with named axes."""

import jax
import jax.numpy as jnp
from flax import nnx

Axes = tuple[tuple[str | None, int], ...]  # (logical name, size) of each axis in turn; None: never split

_INIT_STDDEV = 0.02  # of random weights; GPT-2's choice, kept by the Llama family


def param(
    axes: Axes,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    init: str = "normal",
    *,
    read_share: float = 1.0,
    placement: tuple[int, ...] = (),
) -> nnx.Param:
    """A parameter of the given axes, `init` being "normal", "zeros" or "ones".

    The names are kept as the metadata `logical_axes`; `jaxinfer.partitioning` turns them into shardings.
    `read_share` is kept too: how much of it a decode step has to read at least, for counting the bytes that it moves.
    And so is `placement`: the expert in each place of the experts' axis.
    """
    shape = tuple(size for _, size in axes)
    if init == "normal":
        value = jax.random.normal(rngs.params(), shape, dtype) * jnp.asarray(_INIT_STDDEV, dtype)
    else:
        value = {"zeros": jnp.zeros, "ones": jnp.ones}[init](shape, dtype)
    names = tuple(name for name, _ in axes)
    return nnx.Param(value, logical_axes=names, read_share=read_share, placement=placement)
