"""Grouped products of every backend against NumPy in float64. On a CPU kernels are interpreted."""

import functools
from types import ModuleType, SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.grouped_matmul import Product, backend, backends, choose, triton
from pallas_kernels.grouped_matmul.triton_kernel import Tiles, Tuning, grouped_matmul, make_tiles

NUM_GROUPS, NUM_INPUTS, NUM_OUTPUTS = 5, 24, 40
UNITS = {"float32": 2e-5, "bfloat16": 2**-8, "float16": 2**-11}  # of the last place, of a number near one


pytestmark = pytest.mark.any_device


@pytest.fixture(params=backends())
def module(request: pytest.FixtureRequest) -> ModuleType:
    return backend(request.param)


@functools.cache
def multiply(module: ModuleType) -> Any:
    return jax.jit(functools.partial(module.grouped_map, lambda product, params, x: product(x, *params)))


def arrays(num_rows: int, num_inputs: int = NUM_INPUTS, num_outputs: int = NUM_OUTPUTS, dtype: Any = "float32"):
    rng = np.random.default_rng(num_rows)
    x = rng.standard_normal((num_rows, num_inputs)) / num_inputs**0.5
    weights = rng.standard_normal((NUM_GROUPS, num_outputs, num_inputs))
    biases = rng.standard_normal((NUM_GROUPS, num_outputs))
    return tuple(np.asarray(jnp.asarray(array, dtype)) for array in (x, weights, biases))


def expected(x: np.ndarray, weights: np.ndarray, group: np.ndarray) -> np.ndarray:
    return np.einsum("ri,roi->ro", x.astype(np.float64), weights.astype(np.float64)[group])


@pytest.mark.parametrize("num_rows", [1, 3, 40, 700])
def test_products_of_groups_of_every_size(module: ModuleType, num_rows: int):
    """None, one row, all rows; 700 rows take several tiles of a group."""
    x, weights, biases = arrays(num_rows)
    rng = np.random.default_rng(num_rows)
    mostly_one = np.where(rng.random(num_rows) < 0.9, 1, 4)
    for groups in (rng.integers(0, NUM_GROUPS, num_rows), np.full(num_rows, 3), mostly_one):
        group = np.sort(groups)
        sizes = np.bincount(group, minlength=NUM_GROUPS).astype(np.int32)
        exact = expected(x, weights, group)
        np.testing.assert_allclose(multiply(module)((weights,), x, sizes), exact, atol=2e-5)
        with_bias = multiply(module)((weights, biases), x, sizes)
        np.testing.assert_allclose(with_bias, exact + biases[group], atol=2e-5)


@pytest.mark.parametrize("dtype", UNITS)
def test_sums_are_rounded_once(module: ModuleType, dtype: str):
    x, weights, _ = arrays(90, 333, dtype=dtype)
    group = np.sort(np.random.default_rng(0).integers(0, NUM_GROUPS, 90))
    sizes = np.bincount(group, minlength=NUM_GROUPS).astype(np.int32)
    out = multiply(module)((weights,), x, sizes)
    assert out.dtype == dtype
    exact = expected(x, weights, group)
    assert (np.abs(np.asarray(out, np.float64) - exact) <= UNITS[dtype] * np.maximum(1, np.abs(exact))).all()


@pytest.mark.parametrize(("num_inputs", "num_outputs"), [(16, 16), (17, 31), (128, 64), (300, 70), (333, 129)])
def test_widths_and_depths_that_tiles_do_not_divide(module: ModuleType, num_inputs: int, num_outputs: int):
    x, weights, _ = arrays(50, num_inputs, num_outputs)
    sizes = np.array([0, 20, 1, 29, 0], np.int32)
    out = multiply(module)((weights,), x, sizes)
    exact = expected(x, weights, np.repeat(np.arange(NUM_GROUPS), sizes))
    np.testing.assert_allclose(out, exact, atol=2e-5)


def test_weights_with_several_dimensions_of_outputs(module: ModuleType):
    """Pairs of rows, as gpt-oss has them."""
    x, weights, biases = arrays(12)
    sizes = np.array([3, 0, 4, 5, 0], np.int32)
    in_pairs = weights.reshape(NUM_GROUPS, -1, 2, NUM_INPUTS), biases.reshape(NUM_GROUPS, -1, 2)
    out = multiply(module)(in_pairs, x, sizes)
    np.testing.assert_array_equal(out.reshape(12, -1), multiply(module)((weights, biases), x, sizes))


def test_neither_weights_of_no_rows_nor_rows_of_no_group_are_read(module: ModuleType):
    """Nor rows and weights of other groups: of a group with infinite weights the others know nothing."""
    weights = np.ones((5, NUM_OUTPUTS, NUM_INPUTS), np.float32)
    weights[1], weights[4], weights[3] = np.nan, np.nan, np.inf
    x = np.ones((9, NUM_INPUTS), np.float32)
    x[6:] = np.nan
    out = np.asarray(multiply(module)((weights,), x, np.array([2, 0, 3, 1, 0], np.int32)))
    np.testing.assert_array_equal(out[:5], NUM_INPUTS)
    np.testing.assert_array_equal(out[5], np.inf)


def test_two_products_in_a_row_and_what_is_between(module: ModuleType):
    """Rows of no group are whatever between the two, and still reach no other."""
    x, up, _ = arrays(30)
    down = arrays(31)[1].swapaxes(1, 2)
    sizes = np.array([7, 0, 0, 11, 2], np.int32)

    def mlp(product: Product, params: Any, rows: jax.Array) -> jax.Array:
        return product(jnp.tanh(product(rows, params["up"])), params["down"])

    out = jax.jit(functools.partial(module.grouped_map, mlp))({"up": up, "down": down}, x, sizes)
    group = np.repeat(np.arange(NUM_GROUPS), sizes)
    exact = expected(np.tanh(expected(x[:20], up, group)), down, group)
    np.testing.assert_allclose(out[:20], exact, atol=1e-4)


def test_tiles_cover_each_row_of_a_group_once():
    rng = np.random.default_rng(0)
    tiles_of = jax.jit(make_tiles, static_argnums=(1, 2))
    for case in range(40):
        sizes = rng.integers(0, [1, 3, 40][case % 3], 12) * (rng.random(12) < 0.5)
        num_rows = 250
        tiles = [*zip(*map(np.asarray, tiles_of(sizes.astype(np.int32), num_rows, 16)), strict=True)]
        rows = [(group, first + i) for group, first, count in tiles for i in range(count)]
        assert rows == [*zip(np.repeat(np.arange(12), sizes), range(sizes.sum()), strict=True)]
        assert max(count for _, _, count in tiles) <= 16


def test_tiles_can_be_computed_in_any_order():
    """As a GPU does: none writes a row of another, which it would have wrong."""
    x, weights, _ = arrays(50)
    sizes = np.array([2, 20, 1, 26, 1], np.int32)
    backward = Tiles(*(array[::-1] for array in make_tiles(jnp.asarray(sizes), 50, 16)))
    tuning = triton._that_fits(triton.TUNINGS[0], jnp.asarray(weights), itemsize=4)
    out = grouped_matmul(jnp.asarray(x), jnp.asarray(weights), backward, tuning)
    np.testing.assert_allclose(out, expected(x, weights, np.repeat(np.arange(NUM_GROUPS), sizes)), atol=2e-5)


def test_few_rows_have_few_tiles():
    """Not as many as there are groups."""
    assert len(make_tiles(jnp.ones(128, jnp.int32), 8, 16).group) == 8


def test_tiles_are_as_large_as_groups_and_as_memory_is():
    rows = [triton._tuning(num_rows, 128).rows for num_rows in (8, 1024, 2048, 8192, 65536)]
    assert rows == [16, 16, 32, 128, 128]
    whole, narrow = jnp.zeros((1, 4096, 4096)), jnp.zeros((1, 48, 4096))
    assert triton._that_fits(triton.TUNINGS[-1], whole, itemsize=2) == triton.TUNINGS[-1]
    assert triton._that_fits(triton.TUNINGS[-1], whole, itemsize=4).depth == 32
    assert triton._that_fits(triton.TUNINGS[-1], narrow, itemsize=2).columns == 32


@pytest.mark.parametrize("sizes", [{"rows": 8}, {"columns": 48}, {"depth": 0}])
def test_sizes_of_tiles_that_cannot_be_are_refused(sizes: dict[str, int]):
    (name,) = sizes
    with pytest.raises(ValueError, match=f"{name} {sizes[name]}: must be a power of two, at least 16"):
        Tuning(**({"rows": 16, "columns": 16, "depth": 16, "num_warps": 4, "num_stages": 2} | sizes))


@pytest.mark.parametrize(
    ("platform", "kind", "capability", "size", "choice"),
    [
        ("cpu", "cpu", None, 64, "xla"),
        ("gpu", "NVIDIA H100", "9.0", 64, "triton"),
        (
            "gpu",
            "NVIDIA H100",
            "9.0",
            8,
            "xla (triton cannot: it multiplies by 16 numbers at once, and a weight has a dimension of 8)",
        ),
        (
            "gpu",
            "Tesla T4",
            "7.5",
            64,
            "xla (triton cannot: it is for GPUs of compute capability 8.0 or more, and Tesla T4 has 7.5)",
        ),
    ],
)
def test_the_preferred_one_that_can_is_chosen_and_the_others_say_why_not(
    platform: str, kind: str, capability: str | None, size: int, choice: str
):
    device: Any = SimpleNamespace(platform=platform, device_kind=kind, compute_capability=capability)
    assert str(choose([size], device)) == choice
    if "(" in choice:
        with pytest.raises(ValueError, match="--moe_backend=triton: it "):
            backend("triton", size, device=device)


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"--moe_backend=magic: no such backend; known: auto, triton, xla"):
        backend("magic")
