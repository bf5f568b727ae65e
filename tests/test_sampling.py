"""Sampling against NumPy in float64, and the promise that a row depends on nothing but itself."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
import pytest

from jaxinfer import batch
from jaxinfer.batch import StepShape
from jaxinfer.sampling import SamplingArrays, argmax, drop_unlikely, first_likely, sample
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.slot_table import SlotTable
from jaxinfer.step_plan import StepPlan
from pallas_kernels.noise import gumbel
from tests.fake_runner import make_request

VOCAB = 50
NUM_DRAWS = 20_000

sample_jit = jax.jit(sample)


def arrays(
    rows: int,
    temperature: npt.ArrayLike = 1.0,
    top_k: npt.ArrayLike = 0,
    top_p: npt.ArrayLike = 1.0,
    min_p: npt.ArrayLike = 0.0,
    seeds: npt.ArrayLike | None = None,
) -> SamplingArrays:
    """Parameters are numbers, or one per row; the flags are set as `batch` sets them."""
    temperature, top_p, min_p = (np.full(rows, x, np.float32) for x in (temperature, top_p, min_p))
    top_k = np.full(rows, top_k, np.int32)
    seeds = np.arange(rows) if seeds is None else np.asarray(seeds)
    return SamplingArrays(
        temperature=jnp.array(temperature),
        top_k=jnp.array(top_k),
        top_p=jnp.array(top_p),
        min_p=jnp.array(min_p),
        seed=jnp.array(seeds.astype(np.uint32)),
        draws=jnp.array(np.any(temperature > 0)),
        truncates=jnp.array(np.any((top_k > 0) | (top_p < 1) | (min_p > 0))),
    )


def logits(rows: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 2, (rows, VOCAB)).astype(np.float32)


def reference_keep(row: np.ndarray, top_k: int, top_p: float, min_p: float = 0.0) -> set[int]:
    """Which ids survive min-p, then top-k, then top-p, by sorting in float64."""
    order = np.argsort(-row.astype(np.float64))
    probs = np.exp(row[order].astype(np.float64) - row.max())
    order = order[probs >= min_p][: top_k or VOCAB]
    probs = probs[: len(order)]
    before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
    return set(order[before < top_p].tolist())


@jax.jit
def kept(x: jax.Array, min_p: jax.Array, top_k: jax.Array, top_p: jax.Array) -> jax.Array:
    """bool [B, V]; whether each token is the one when it has the highest score, and those with the lowest ids next."""
    num_tokens = x.shape[-1]
    x = drop_unlikely(x - jnp.max(x, axis=-1, keepdims=True), min_p)

    def is_drawn(token: jax.Array) -> jax.Array:
        scores = jnp.where(jnp.arange(num_tokens) == token, 1.0, -jnp.arange(num_tokens, dtype=jnp.float32))
        scores = jnp.where(x > -jnp.inf, scores, -jnp.inf)
        return first_likely(x, scores, top_k, top_p) == token

    return jax.vmap(is_drawn, out_axes=1)(jnp.arange(num_tokens))


@pytest.mark.parametrize("top_k", [0, 1, 7, VOCAB])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("min_p", [0.0, 1e-4, 0.03, 0.4, 1.0])
def test_truncation_keeps_what_a_sort_keeps(min_p: float, top_k: int, top_p: float):
    x = logits(16)
    p = arrays(16, 1.0, top_k, top_p, min_p)
    found = np.asarray(kept(jnp.array(x), p.min_p, p.top_k, p.top_p))
    for row, found_row in zip(x, found, strict=True):
        assert set(np.flatnonzero(found_row).tolist()) == reference_keep(row, top_k, top_p, min_p)


def test_min_p_keeps_ties_and_leaves_rows_without_it_alone():
    """An infinite logit, as a tiny temperature makes, or a NaN must not empty a row that has no min_p."""
    x = np.array([[3, 3, 2.9, -np.inf], [np.inf, 1, -2, 0], [np.nan, 1, -2, 0], [2, 2, 2, 2]], np.float32)
    found = np.asarray(drop_unlikely(jnp.array(x), jnp.array([1.0, 0.0, 0.0, 1.0])))
    assert found[0].tolist() == [3, 3, -np.inf, -np.inf]
    np.testing.assert_array_equal(found[1:], x[1:])


def test_min_p_comes_after_temperature():
    """Probabilities 0.6 and 0.4, min_p 0.7: a ratio of 2/3 falls short, but at temperature 2 its root does not."""
    x = jnp.full((32, VOCAB), -jnp.inf).at[:, :2].set(jnp.log(jnp.array([0.6, 0.4])))
    for temperature, drawn in ((1.0, {0}), (2.0, {0, 1})):
        out = sample_jit(x, arrays(32, temperature, min_p=0.7), jnp.zeros(32, jnp.int32))
        assert set(np.asarray(out).tolist()) == drawn


@pytest.mark.parametrize(("top_k", "top_p"), [(4, 1.0), (3, 1.0), (3, 0.999), (0, 0.99999)])
def test_truncation_keeps_ties_and_both_zeros(top_k: int, top_p: float):
    x, p = np.array([[-0.0, 0.0, -np.inf, 1.0, -7.0, 2.0]], np.float32), arrays(1, 1.0, top_k, top_p)
    found = np.asarray(kept(jnp.array(x), p.min_p, p.top_k, p.top_p))
    assert found.tolist() == [[True, True, False, True, top_p == 0.99999, True]]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("params", [{"top_p": 0.5}, {"top_k": 2}, {"top_k": 2, "top_p": 0.5}, {"min_p": 0.5}], ids=str)
def test_a_row_that_is_not_finite_ends(bad: float, params: dict[str, Any]):
    """With some token; the others are what they are alone."""
    x = logits(3)
    alone = sample_jit(jnp.array(x), arrays(3, **params), jnp.zeros(3, jnp.int32))
    x[1] = bad
    out = sample_jit(jnp.array(x), arrays(3, **params), jnp.zeros(3, jnp.int32))
    assert np.asarray(out)[[0, 2]].tolist() == np.asarray(alone)[[0, 2]].tolist()


def test_few_of_many_that_are_almost_alike():
    """Of 100,000 tokens three are kept, and the draw begins among all."""
    rng = np.random.default_rng(0)
    x = np.asarray(rng.normal(0, 1e-3, (4, 100_000)), np.float32)
    likeliest = np.argsort(-x)[:, :3]
    out = np.asarray(sample_jit(jnp.array(x), arrays(4, top_k=[3, 3, 0, 3], top_p=[1, 0.9, 1e-9, 1]), jnp.arange(4)))
    assert out[0] in likeliest[0] and out[1] in likeliest[1] and out[2] == likeliest[2][0] and out[3] in likeliest[3]


@pytest.mark.parametrize("extreme", [{"temperature": 1e-37}, {"top_p": 1e-40}, {"min_p": 1.0}, {"top_k": 1}], ids=str)
def test_extreme_parameters_give_the_likeliest(extreme: dict):
    x = logits(8)
    out = sample(jnp.array(x), arrays(8, **extreme), jnp.zeros(8, jnp.int32))
    assert np.asarray(out).tolist() == x.argmax(-1).tolist()


def test_temperature_zero_is_the_argmax_even_beside_rows_that_draw():
    x = logits(4)
    params = arrays(4, [0.0, 1.0, 0.0, 5.0])
    out = np.asarray(sample_jit(jnp.array(x), params, jnp.zeros(4, jnp.int32)))
    assert out[[0, 2]].tolist() == x.argmax(-1)[[0, 2]].tolist()


def p_value(counts: np.ndarray, probs: np.ndarray) -> float:
    """Of the chi-square test that `counts` [V] were drawn from `probs` [V]; rare tokens share one cell."""
    order = np.argsort(-probs)
    expected, observed = probs[order] * counts.sum(), counts[order]
    rest = np.flatnonzero(np.cumsum(expected[::-1])[::-1] >= 5)[-1]  # the shortest tail that expects 5
    expected = np.append(expected[:rest], expected[rest:].sum())
    observed = np.append(observed[:rest], observed[rest:].sum())
    statistic = ((observed - expected) ** 2 / expected).sum()
    return float(jax.scipy.stats.chi2.sf(jnp.float32(statistic), jnp.float32(len(expected) - 1)))


def draw_counts(x: np.ndarray, position: int, **params) -> np.ndarray:
    positions = jnp.full(NUM_DRAWS, position, jnp.int32)
    out = sample_jit(jnp.broadcast_to(x, (NUM_DRAWS, VOCAB)), arrays(NUM_DRAWS, **params), positions)
    return np.bincount(np.asarray(out), minlength=VOCAB)


def reference_probs(x: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    keep = reference_keep(x / np.float32(temperature), top_k, top_p, min_p)
    probs = np.array([np.exp(np.float64(v) / temperature) if i in keep else 0.0 for i, v in enumerate(x)])
    return probs / probs.sum()


FLAT = logits(1, seed=3)[0] / 2  # so that no combination leaves one token only
COMBINATIONS: list[tuple[float, int, float, float]] = list(
    itertools.product((0.7, 1.0, 1.3), (0, 10), (0.8, 1.0), (0.0, 0.05))
)


@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
def test_draws_follow_the_distribution(combination: tuple[float, int, float, float]):
    """Chi-square over 20,000 draws with fixed seeds (`pytest -s` shows the p-values).

    New seeds would fail one of the 24 with odds of 24 in 10,000; the test after this one shows what it notices.
    """
    params = dict(zip(("temperature", "top_k", "top_p", "min_p"), combination, strict=True))
    probs = reference_probs(FLAT, *combination)
    counts = draw_counts(FLAT, COMBINATIONS.index(combination), **params)
    p = p_value(counts, probs)
    print(f"{params}: p = {p:.4f} over {np.count_nonzero(probs)} tokens")
    assert counts[probs == 0].sum() == 0
    assert p > 1e-4


@pytest.mark.parametrize("wrong", [{"temperature": 1.05}, {"top_k": 11}, {"top_p": 0.85}, {"min_p": 0.04}], ids=str)
def test_chi_square_notices_parameters_that_are_slightly_off(wrong: dict[str, float]):
    right = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    right |= {name: {"top_k": 10, "top_p": 0.8, "min_p": 0.05}[name] for name in wrong if name != "temperature"}
    counts, probs = draw_counts(FLAT, 0, **right | wrong), reference_probs(FLAT, **right)
    assert counts[probs == 0].sum() > 0 or p_value(counts, probs) < 1e-6


def test_a_draw_depends_on_seed_and_position_and_not_on_the_batch():
    """32 rows of mixed parameters alone, then shuffled in batches of other shapes and other neighbours."""
    rng = np.random.default_rng(1)
    x, positions, seeds = logits(32), rng.integers(0, 4096, 32), rng.integers(0, 2**32, 32)
    options = ([0.0, 0.5, 1.0, 1.7], [0, 0, 5], [1.0, 1.0, 0.9], [0.0, 0.0, 0.1])
    params = [rng.choice(values, 32) for values in options]

    def draw(rows: np.ndarray) -> list[int]:
        sampling = arrays(len(rows), *(p[rows] for p in params), seeds=seeds[rows])
        return np.asarray(sample_jit(jnp.array(x[rows]), sampling, jnp.array(positions[rows], jnp.int32))).tolist()

    alone = [draw(np.array([row]))[0] for row in range(32)]
    mismatches = total = 0
    for size in (4, 32):
        for _ in range(256 // size):
            rows = rng.permutation(32)[:size]
            mismatches += sum(a != alone[row] for a, row in zip(draw(rows), rows, strict=True))
            total += size
    print(f"seed reproducible across batch positions and shapes: {mismatches} of {total} draws differ")
    assert mismatches == 0


def test_different_seeds_and_positions_draw_differently():
    """Uniform over 50 ids: 32 equal draws by chance have odds of 50**-31."""
    x = jnp.zeros((32, VOCAB))
    by_seed = sample_jit(x, arrays(32), jnp.zeros(32, jnp.int32))
    by_position = sample_jit(x, arrays(32, seeds=[5] * 32), jnp.arange(32, dtype=jnp.int32))
    assert len(set(np.asarray(by_seed).tolist())) > 10
    assert len(set(np.asarray(by_position).tolist())) > 10


@pytest.mark.parametrize("seed", [0, 1, 2**32 - 1])
def test_noise_is_that_of_jax(seed: int):
    """Bit for bit, so that its generator's tests stand for ours."""
    token_ids = jnp.arange(1000, dtype=jnp.uint32)
    for position in (0, 7, 2**31 - 1):
        key = jax.random.wrap_key_data(jnp.array([seed, position], jnp.uint32), impl="threefry2x32")
        expected = jax.random.gumbel(key, (1000,), jnp.float32)
        np.testing.assert_array_equal(gumbel(jnp.uint32(seed), jnp.uint32(position), token_ids), expected)


@pytest.mark.parametrize("num_tokens", [1, 7, 1000])
def test_the_first_of_the_largest(num_tokens: int):
    x = np.random.default_rng(0).integers(-3, 3, (64, num_tokens)).astype(np.float32)
    assert np.asarray(argmax(jnp.array(x))).tolist() == x.argmax(-1).tolist()
    x[:, num_tokens // 2] = np.nan
    assert np.all(np.asarray(argmax(jnp.array(x))) < num_tokens)


def test_greedy_batches_generate_no_noise():
    """The draw sits behind a conditional: a greedy batch runs an argmax only."""
    jaxpr = str(jax.make_jaxpr(sample)(jnp.zeros((2, VOCAB)), arrays(2), jnp.zeros(2, jnp.int32)))
    assert jaxpr.index("cond[") < jaxpr.index("xor")


def test_min_p_reaches_the_device_and_alone_asks_for_truncation():
    """A parameter that only one row uses, and no other one, must still switch the truncation on."""

    def sampling(*min_p: float) -> SamplingArrays:
        requests, table = [make_request(i, [1], 4) for i in range(len(min_p))], SlotTable(1, len(min_p), 1)
        for slot, (request, value) in enumerate(zip(requests, min_p, strict=True)):
            request.params, request.slot = SamplingParams(min_p=value), slot
            table.put(0, slot, request)
        plan = StepPlan([[]], [requests], [np.arange(len(requests))], [np.ones(len(requests), np.int32)], 1)
        return batch.build(plan, StepShape(0, 0, len(requests), 1, 1), table).sampling

    plain, mixed = sampling(0.0, 0.0), sampling(0.0, 0.25)
    assert not plain.truncates and mixed.truncates
    assert mixed.min_p.tolist() == [0.0, 0.25] and mixed.min_p.dtype == np.float32


@pytest.mark.parametrize("min_p", [-0.1, 1.1, float("nan"), True, "0.1"])
def test_min_p_outside_its_range_is_refused(min_p: float):
    with pytest.raises(ValueError, match=r"min_p=.*must be a number in \[0, 1\]"):
        SamplingParams(min_p=min_p)
