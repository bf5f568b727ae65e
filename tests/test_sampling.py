"""Sampling against NumPy in float64, and the promise that a row depends on nothing but itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.sampling import SamplingArrays, sample, truncate

VOCAB = 50


def arrays(rows: int, temperature=1.0, top_k=0, top_p=1.0, seeds=None) -> SamplingArrays:
    return SamplingArrays(
        jnp.full(rows, temperature, jnp.float32),
        jnp.full(rows, top_k, jnp.int32),
        jnp.full(rows, top_p, jnp.float32),
        jnp.arange(rows, dtype=jnp.uint32) if seeds is None else jnp.array(seeds, jnp.uint32),
        draws=jnp.array(temperature > 0),
        truncates=jnp.array(top_k > 0 or top_p < 1),
    )


def logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def reference_keep(row: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """Which ids survive, by sorting in float64."""
    order = np.argsort(-row.astype(np.float64))[: top_k or VOCAB]
    probs = np.exp(row[order].astype(np.float64) - row.max())
    before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
    return set(order[before < top_p].tolist())


@pytest.mark.parametrize("top_k", [0, 1, 7, VOCAB])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.93, 1.0])
def test_truncation_keeps_what_a_sort_keeps(top_k: int, top_p: float):
    x = logits(16)
    kept = truncate(jnp.array(x), jnp.full(16, top_k, jnp.int32), jnp.full(16, top_p, jnp.float32))
    for row, kept_row in zip(x, np.isfinite(kept), strict=True):
        assert set(np.flatnonzero(kept_row).tolist()) == reference_keep(row, top_k, top_p)


def test_truncation_with_negative_zero_and_infinite_logits():
    x = np.array([[-0.0, 0.0, -np.inf, 5.0, -7.0, 3e38]], np.float32)
    kept = np.isfinite(truncate(jnp.array(x), jnp.array([4], jnp.int32), jnp.array([1.0], jnp.float32)))
    assert kept.tolist() == [[True, True, False, True, False, True]]


def test_temperature_zero_is_the_argmax_even_beside_rows_that_draw():
    x = logits(4)
    params = arrays(4)._replace(temperature=jnp.array([0.0, 1.0, 0.0, 5.0]))
    out = np.asarray(sample(jnp.array(x), params, jnp.zeros(4, jnp.int32)))
    assert out[[0, 2]].tolist() == x.argmax(-1)[[0, 2]].tolist()


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 10, 1.0), (1.3, 0, 0.8), (1.0, 20, 0.9)]
)
def test_draws_follow_the_distribution(temperature: float, top_k: int, top_p: float):
    """Chi-square over 20,000 draws with fixed seeds; a wrong temperature or threshold gives p near 0.

    The bound is the 99.99 % point of the normal approximation for the cells in use, so the false-alarm odds of
    a new seed would be 1 in 10,000.
    """
    draws = 20_000
    x = logits(1, seed=3)[0]
    keep = reference_keep(x / temperature, top_k, top_p)
    probs = np.array([np.exp(np.float64(v) / temperature) if i in keep else 0.0 for i, v in enumerate(x)])
    probs /= probs.sum()
    params = arrays(draws, temperature, top_k, top_p)
    out = sample(jnp.broadcast_to(x, (draws, VOCAB)), params, jnp.full(draws, 9, jnp.int32))
    counts = np.bincount(np.asarray(out), minlength=VOCAB)
    assert counts[probs == 0].sum() == 0
    cells = probs * draws >= 5
    chi2 = ((counts - probs * draws)[cells] ** 2 / (probs * draws)[cells]).sum()
    freedom = cells.sum() - 1
    assert chi2 < freedom + 3.72 * np.sqrt(2 * freedom) + 5


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch():
    x = logits(8)
    alone = [
        int(sample(jnp.array(x[i : i + 1]), arrays(1, seeds=[100 + i]), jnp.array([i], jnp.int32))[0]) for i in range(8)
    ]
    order = np.random.default_rng(1).permutation(8)
    together = sample(jnp.array(x[order]), arrays(8, seeds=100 + order), jnp.array(order, jnp.int32))
    assert np.asarray(together).tolist() == [alone[i] for i in order]


def test_different_seeds_and_positions_draw_differently():
    """Uniform over 50 ids: 64 equal draws by chance have odds of 50**-63."""
    x = jnp.zeros((64, VOCAB))
    by_seed = sample(x, arrays(64), jnp.zeros(64, jnp.int32))
    by_position = sample(x, arrays(64, seeds=[5] * 64), jnp.arange(64, dtype=jnp.int32))
    assert len(set(np.asarray(by_seed).tolist())) > 10
    assert len(set(np.asarray(by_position).tolist())) > 10


def test_greedy_batches_generate_no_noise():
    """The draw sits behind a conditional: a greedy batch runs an argmax only."""
    jaxpr = str(jax.make_jaxpr(sample)(jnp.zeros((2, VOCAB)), arrays(2), jnp.zeros(2, jnp.int32)))
    assert jaxpr.index("cond[") < jaxpr.index("random_bits")
