"""Attention in C++: each query by itself, each number as it is, and nothing of what a query does not see."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.paged_attention import AttentionSpec, cpu
from pallas_kernels.paged_attention.pages import QuantizedPages
from tests.native_kernels import SPEC, attend, needs_compiler


@needs_compiler
@pytest.mark.parametrize("other", [{}, {"window": 37}, {"soft_cap": 3.0}])
def test_a_query_gets_the_same_bits_whatever_is_beside_it(other: dict[str, Any]):
    """So tokens do not depend on how a prompt is cut, and those of a batch are those of one alone."""
    rng = np.random.default_rng(0)
    spec = AttentionSpec(num_q_heads=6, num_kv_heads=2, head_dim=40, page_size=16, scale=0.2, **other)
    q = rng.standard_normal((170, 6, 40), np.float32)
    pages = rng.standard_normal((12, 2, 16, 40), np.float32)
    table, positions = rng.permutation(12), np.arange(170)
    whole = attend(q, pages, positions, spec, table=table)
    for first, last in ((0, 1), (63, 66), (5, 170), (169, 170)):
        part = attend(q[first:last], pages, positions[first:last], spec, table=table)
        np.testing.assert_array_equal(part, whole[first:last])


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_number_of_16_bits_is_what_it_is(dtype: str):
    """A query that sees one token gets its values, infinities and NaN too. What float32 has as denormal may be zero."""
    bits = np.arange(2**16, dtype=np.uint16)
    values = jnp.asarray(bits.view(jnp.dtype(dtype)).reshape(-1, 2, 16, 16))
    keys, tables = jnp.zeros_like(values), np.arange(len(values), dtype=np.int32)[:, None]
    one = AttentionSpec(num_q_heads=2, num_kv_heads=2, head_dim=16, page_size=16, scale=1.0, window=1)
    q, tables = jnp.zeros((len(tables), 16, 2, 16), values.dtype), jnp.asarray(tables)
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (len(tables), 16))
    found = cpu.paged_attention(q, keys, values, tables, positions, spec=one)
    found, values = (x.astype(jnp.float32) for x in (found.transpose(0, 2, 1, 3), values))
    is_normal = ~(jnp.abs(values) < jnp.finfo(jnp.float32).tiny)
    np.testing.assert_array_equal(found, jnp.where(is_normal, values, 0))


@needs_compiler
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_each_number_of_8_bits_is_what_it_is(dtype: str):
    numbers = np.arange(2**8, dtype=np.uint8).view(jnp.dtype(dtype)).reshape(1, 1, 16, 16)
    values = QuantizedPages(jnp.asarray(numbers), jnp.full((1, 1, 16), 0.5, jnp.float32))
    one = AttentionSpec(
        num_q_heads=1, num_kv_heads=1, head_dim=16, page_size=16, scale=1.0, window=1, cache_dtype=dtype
    )
    keys = values._replace(values=jnp.zeros_like(values.values))
    positions = jnp.arange(16, dtype=jnp.int32)[None]
    q, table = jnp.zeros((1, 16, 1, 16), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    found = cpu.paged_attention(q, keys, values, table, positions, spec=one)
    np.testing.assert_array_equal(found[0, :, 0], numbers[0, 0].astype(np.float32) / 2)


@needs_compiler
def test_nan_in_a_query_stays_with_it():
    q, pages = np.ones((20, 4, 16), np.float32), np.ones((4, 2, 16, 16), np.float32)
    q[7, 2] = np.nan
    found = attend(q, pages, np.arange(20))
    assert np.isnan(found[7, 2]).all() and np.isnan(found).sum() == 16


@needs_compiler
@pytest.mark.parametrize("window", [None, 9])
def test_nan_in_a_value_stays_with_those_that_see_it(window: int | None):
    spec = dataclasses.replace(SPEC, window=window)
    q, keys = np.ones((64, 4, 16), np.float32), np.ones((4, 2, 16, 16), np.float32)
    values = keys.copy()
    values[1, :, 4] = np.nan  # of token 20
    found = attend(q, keys, np.arange(64), spec, v_pages=values)
    sees = (np.arange(64) >= 20) & (np.arange(64) < 20 + (window or 64))
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(sees[:, None, None], found.shape))


@needs_compiler
def test_scores_with_a_cap():
    """Two tokens' scores, the second 0: what comes out is the weight of the first."""
    scores = np.concatenate([np.linspace(-300, 300, 1001), np.geomspace(1e-6, 1, 50)]).astype(np.float32)
    spec = AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=16, page_size=16, scale=1.0, soft_cap=50.0)
    q, keys, values = np.zeros((len(scores), 1, 1, 16), np.float32), *np.zeros((2, 1, 1, 16, 16), np.float32)
    q[:, 0, 0, 0], keys[0, 0, 0, 0], values[0, 0, 0] = scores, 1, 1
    one = np.ones((len(scores), 1), np.int32)
    found = cpu.paged_attention(*map(jnp.asarray, (q, keys, values, 0 * one, one)), spec=spec)[:, 0, 0, 0]
    capped = 50 * np.tanh(scores.astype(np.float64) / 50)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-capped)), rtol=1e-5)


@needs_compiler
def test_scores_that_are_all_infinitely_low_leave_no_trace():
    """Those of a block, before others that are low, and lower than e^x can be."""
    q, keys = np.ones((1, 4, 16), np.float32), np.full((8, 2, 16, 16), -np.inf, np.float32)
    keys[4:] = -50  # a score of -200
    found = attend(q, keys, np.array([127]), v_pages=np.ones_like(keys), table=range(8))
    np.testing.assert_allclose(found, 1, rtol=1e-6)


@needs_compiler
def test_scores_far_apart():
    """The largest has all the weight; of those below e^-87 nothing is left."""
    q, keys = np.ones((1, 4, 16), np.float32), np.zeros((4, 2, 16, 16), np.float32)
    values = np.ones_like(keys)
    keys[0, :, 5], values[0, :, 5] = 100, 7
    np.testing.assert_array_equal(attend(q, keys, np.array([40]), v_pages=values), np.full((1, 4, 16), 7))
