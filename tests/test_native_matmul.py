"""Products in C++: of few rows and of many, with one weight or several."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.partitioning import Partitioner
from pallas_kernels import matmul
from tests.native_kernels import needs_compiler


@needs_compiler
@pytest.mark.parametrize("numbers_of_rows", [[*range(1, 9), 31, 32], [33, 47, 64]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_with_any_weight(dtype: str, numbers_of_rows: list[int]):
    """Beside NumPy in float64, of sizes that no vector divides too. Rows give the same bits in any company."""
    rng = np.random.default_rng(0)
    for num_out, num_in in ((7, 5), (3, 16), (33, 200), (700, 129), (50, 2100)):
        x = jnp.asarray(rng.standard_normal((numbers_of_rows[-1], num_in)), dtype)
        weight = jnp.asarray(rng.standard_normal((num_out, num_in)), dtype)
        exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        with matmul.in_kernel(True):
            products = [matmul.contract(x[:n], weight, jnp.float32) for n in numbers_of_rows]
        np.testing.assert_allclose(products[-1], exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
        for n, product in zip(numbers_of_rows, products, strict=True):
            assert product.dtype == jnp.float32
            np.testing.assert_array_equal(product, products[-1][:n])


@needs_compiler
def test_products_of_the_same_rows_are_those_of_each():
    rng = np.random.default_rng(1)
    x, *weights = (jnp.asarray(rng.standard_normal((n, 40), np.float32)) for n in (50, 3, 900, 8))
    with matmul.in_kernel(True):
        for rows in (x[:5], x):
            for product, weight in zip(matmul.contract_each(rows, weights), weights, strict=True):
                np.testing.assert_array_equal(product, matmul.contract(rows, weight))


@pytest.mark.parametrize("other", [jnp.ones((4, 16), jnp.bfloat16), jnp.ones((4, 17)), jnp.ones((4, 15))])
@needs_compiler
def test_weights_that_the_kernel_would_misread_are_refused(other: jax.Array):
    with matmul.in_kernel(True), pytest.raises(ValueError, match="for rows of 16 numbers: they must have one dtype"):
        matmul.contract_each(jnp.ones((1, 16)), [jnp.ones((4, 16)), other])


@needs_compiler
def test_products_are_a_kernels_only_where_they_can_be():
    """On one device; and rounded once to what the caller wants."""

    def text(num_rows: int, is_possible: bool, dtype: str = "float32") -> str:
        with matmul.in_kernel(is_possible):
            x, weight = jnp.ones((num_rows, 1, 16), dtype), jnp.ones((4, 16), dtype)
            return jax.jit(lambda x, weight: matmul.contract(x, weight)).lower(x, weight).as_text()

    assert "jaxinfer_matmul" in text(8, True) and "jaxinfer_matmul" in text(100, True, "bfloat16")
    assert "jaxinfer_matmul" not in text(8, False)
    one, two = (Partitioner.create(mesh) for mesh in ("", "tensor:2"))
    assert one.multiplies_in_kernel and not two.multiplies_in_kernel
    assert not Partitioner.abstract("").multiplies_in_kernel
    with matmul.in_kernel(True):
        assert matmul.contract(jnp.ones((1, 16), jnp.bfloat16), jnp.ones((4, 16), jnp.bfloat16)).dtype == jnp.bfloat16
