"""The product with a weight stored `[out, in]`, as checkpoints store them, written as each platform does it fastest."""

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.native import build
from pallas_kernels.precision import matmul_precision

# On CPU, up to this many rows the product is written weight @ x.T: XLA reads a float32 weight two to three times as
# fast as in x @ weight.T at 2 to 16 rows, and half as fast again at 32.
_MAX_ROWS_WEIGHT_STATIONARY = 64

_KERNEL_WEIGHTS = ("float32", "bfloat16", "float16")

_in_kernel = contextvars.ContextVar("in_kernel", default=False)


@contextlib.contextmanager
def in_kernel(is_possible: bool) -> Iterator[None]:
    """What is traced within may use the kernel for CPUs, where that is faster: XLA could not split it over a mesh."""
    token = _in_kernel.set(is_possible)
    try:
        yield
    finally:
        _in_kernel.reset(token)


def contract(x: jax.Array, weight: jax.Array, out_dtype: jnp.dtype | None = None) -> jax.Array:
    """x [..., I] times weight [O, I] -> [..., O], summed in float32 and rounded once to `out_dtype` (default x's).

    Where a mesh splits I, each device rounds the sum of its part, and these are added in `out_dtype`.
    """
    return contract_each(x, [weight], out_dtype)[0]


def contract_each(x: jax.Array, weights: Sequence[jax.Array], out_dtype: jnp.dtype | None = None) -> list[jax.Array]:
    """`contract` of x with each of the weights [O_i, I], which have one dtype. The kernel for CPUs does all at once."""
    rows, dtype = x.reshape(-1, x.shape[-1]), out_dtype or x.dtype
    if _in_kernel.get() and weights[0].dtype.name in _KERNEL_WEIGHTS:
        products = [product.astype(dtype) for product in _by_kernel(rows, weights)]
    else:
        products = [_by_xla(rows, weight, dtype) for weight in weights]
    return [product.reshape(*x.shape[:-1], product.shape[-1]) for product in products]


def _by_xla(rows: jax.Array, weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    dot = functools.partial(
        lax.dot_general,
        dimension_numbers=(((1,), (1,)), ((), ())),
        precision=matmul_precision(rows.dtype),
        preferred_element_type=dtype,
    )

    def weight_stationary(rows: jax.Array, weight: jax.Array) -> jax.Array:
        # Without the barrier XLA folds the transpose into the product, which makes it x @ weight.T again.
        return lax.optimization_barrier(dot(weight, rows)).T

    if rows.shape[0] <= _MAX_ROWS_WEIGHT_STATIONARY:
        return lax.platform_dependent(rows, weight, cpu=weight_stationary, default=dot)
    return dot(rows, weight)


def _by_kernel(rows: jax.Array, weights: Sequence[jax.Array]) -> Sequence[jax.Array]:
    if problem := build.unavailable():
        raise RuntimeError(f"products in a kernel: {problem}")
    for weight in weights:  # the kernel reads what it is told is there
        if weight.dtype != weights[0].dtype or weight.shape[1:] != rows.shape[1:]:
            raise ValueError(
                f"weights of {[f'{w.dtype}{[*w.shape]}' for w in weights]} for rows of {rows.shape[1]} numbers: they "
                f"must have one dtype, and as many columns"
            )
    products = [jax.ShapeDtypeStruct((len(rows), len(weight)), jnp.float32) for weight in weights]
    return jax.ffi.ffi_call("jaxinfer_matmul", products)(rows.astype(jnp.float32), *weights)
