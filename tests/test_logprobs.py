"""Log-probabilities against NumPy in float64, and the equality that evaluations rely on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.logprobs import Logprobs, token_logprobs

VOCAB, ROWS = 300, 8

logprobs_jit = jax.jit(token_logprobs, static_argnums=2)


def run(logits: np.ndarray, token_ids: np.ndarray, num_top: int) -> Logprobs:
    out = logprobs_jit(jnp.array(logits), jnp.array(token_ids, jnp.int32), num_top)
    return Logprobs(*map(np.asarray, out))


def reference(row: np.ndarray, token_id: int, num_top: int) -> tuple[float, int, list[int], list[float]]:
    """The same of one row, by sorting in float64."""
    row = row.astype(np.float64)
    with np.errstate(divide="ignore"):
        logprobs = row - row.max() - np.log(np.exp(row - row.max()).sum())
    top_ids = sorted(range(len(row)), key=lambda i: (-logprobs[i], i))[:num_top]
    rank = int((logprobs >= logprobs[token_id]).sum())
    return logprobs[token_id], rank, top_ids, [logprobs[i] for i in top_ids]


def random_logits(rng: np.random.Generator) -> np.ndarray:
    """Rows of every scale; half are rounded, so that equal logits abound, and some tokens are masked."""
    x = rng.normal(0, 1, (ROWS, VOCAB)) * rng.choice([0.1, 3, 40], (ROWS, 1)) + rng.choice([0, 1000], (ROWS, 1))
    x = np.where(np.arange(ROWS)[:, None] % 2, x, np.round(x))
    return np.where(rng.random(x.shape) < 0.1, -np.inf, x).astype(np.float32)


@pytest.mark.parametrize("num_top", [0, 1, 20])
def test_matches_float64(num_top: int):
    rng = np.random.default_rng(num_top)
    for _ in range(50):
        x, ids = random_logits(rng), rng.integers(0, VOCAB, ROWS)
        out = run(x, ids, num_top)
        assert [a.dtype for a in out] == [np.float32, np.int32, np.int32, np.float32]
        assert out.top.shape == out.top_ids.shape == (ROWS, num_top)
        for row in range(ROWS):
            token, rank, top_ids, top = reference(x[row], ids[row], num_top)
            np.testing.assert_allclose(out.token[row], token, rtol=2e-6, atol=2e-6)
            np.testing.assert_allclose(out.top[row], top, rtol=2e-6, atol=2e-6)
            assert out.rank[row] == rank
            assert out.top_ids[row].tolist() == top_ids


def test_a_token_has_one_float():
    """lm-eval asks `logprob == max(top logprobs)`: one ulp between two roundings would make it a wrong answer."""
    rng = np.random.default_rng(0)
    checked = 0
    for _ in range(50):
        x = random_logits(rng)
        nth = rng.integers(0, 20, ROWS)
        ids = np.argsort(-x, axis=1, kind="stable")[np.arange(ROWS), nth]
        out = run(x, ids, 20)
        assert np.array_equal(out.token, out.top[np.arange(ROWS), nth])
        checked += ROWS
    assert checked == 400


def test_equal_logits_come_in_order_of_id_and_share_the_later_rank():
    out = run(np.array([[1.0, -0.0, 2.0, 0.0, 2.0, -0.0]], np.float32), np.array([2]), 5)
    assert out.top_ids.tolist() == [[2, 4, 0, 1, 3]]
    assert out.rank.tolist() == [2]
    zero = run(np.array([[1.0, -0.0, 2.0, 0.0, 2.0, -0.0]], np.float32), np.array([1]), 5)
    assert zero.rank.tolist() == [6]
    assert zero.token[0] == zero.top[0, 3] == zero.top[0, 4]


def test_masked_tokens_and_rows_are_minus_infinity_and_not_nan():
    x = np.array([[-np.inf, 3.0, -np.inf], [-np.inf] * 3], np.float32)
    out = run(x, np.array([0, 2]), 2)
    assert out.token.tolist() == [-np.inf, -np.inf]
    assert out.top.tolist() == [[0.0, -np.inf], [-np.inf, -np.inf]]
    assert out.top_ids.tolist() == [[1, 0], [0, 1]]
    assert out.rank.tolist() == [3, 3]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_logits_are_summed_in_float32(dtype: jax.typing.DTypeLike):
    x = jnp.array(np.random.default_rng(5).normal(0, 3, (ROWS, VOCAB)), dtype)
    ids = np.arange(ROWS)
    out = logprobs_jit(x, jnp.array(ids, jnp.int32), 3)
    wanted = [reference(np.asarray(x[row]).astype(np.float64), row, 3)[0] for row in range(ROWS)]
    assert out.token.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(out.token), wanted, rtol=2e-6, atol=2e-6)


def test_likely_tokens_keep_their_relative_precision():
    """A certain token among large logits: log(total) must not vanish in a sum with the largest logit."""
    x = np.full((1, VOCAB), 990.0, np.float32)
    x[0, 7] = 1000.0
    out = run(x, np.array([7]), 1)
    np.testing.assert_allclose(out.token[0], -np.log1p((VOCAB - 1) * np.exp(-10.0)), atol=1e-6)


def test_the_vocabulary_is_not_sorted():
    function = functools.partial(token_logprobs, num_top=5)
    jaxpr = str(jax.make_jaxpr(function)(jnp.zeros((2, VOCAB)), jnp.zeros(2, jnp.int32)))
    assert "top_k" in jaxpr and " sort" not in jaxpr
