"""The kernels that draw tokens against `sampling.sample` as XLA compiles it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.partitioning import Partitioner
from jaxinfer.sampling import sample
from pallas_kernels.draw import Kernel, cpu, kernel_for, triton
from tests.test_sampling import arrays

pytestmark = pytest.mark.any_device
NUM_ROWS = 24


needs_cpu_kernel = pytest.mark.skipif(kernel_for(jax.devices()[0]) is not cpu.draw, reason="no kernel for CPUs here")


@pytest.fixture(params=[triton.draw, pytest.param(cpu.draw, marks=needs_cpu_kernel)], ids=["triton", "cpu"])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    """The first is interpreted on a CPU."""
    return request.param


def both(
    kernel: Kernel, x: np.ndarray, positions: np.ndarray, mesh: str = "", **params: Any
) -> tuple[list[int], list[int]]:
    """What XLA draws, and the kernel."""
    partitioner, given = Partitioner.create(mesh), arrays(len(x), **params)
    of = lambda kernel: jax.jit(  # noqa: E731
        lambda x: sample(x, given, jnp.array(positions), partitioner.in_each_shard, kernel=kernel)
    )
    return of(None)(x).tolist(), of(kernel)(x).tolist()


def mixed(rng: np.random.Generator) -> dict[str, Any]:
    """Every way to draw, and greedy rows, side by side."""
    return {
        "temperature": rng.choice([0, 0.5, 1.0, 1.7], NUM_ROWS),
        "top_k": rng.choice([0, 1, 5, 40], NUM_ROWS),
        "top_p": rng.choice([1.0, 0.9, 0.3], NUM_ROWS),
        "min_p": rng.choice([0, 0.02], NUM_ROWS),
    }


@pytest.mark.parametrize("vocab_size", [2, 50, 4096, 4097, 12_289])
@pytest.mark.parametrize("deviation", [0.01, 3.0])
def test_the_same_tokens_are_drawn(kernel: Kernel, vocab_size: int, deviation: float):
    """Of fewer tokens than a piece has, of whole pieces, and of one more; of rows nearly alike and peaked."""
    rng = np.random.default_rng(vocab_size)
    x = rng.normal(0, deviation, (NUM_ROWS, vocab_size)).astype(np.float32)
    of_xla, of_kernel = both(kernel, x, rng.integers(0, 9999, NUM_ROWS).astype(np.int32), **mixed(rng))
    assert of_kernel == of_xla


@needs_cpu_kernel
@pytest.mark.parametrize("deviation", [0.1, 1.0, 3.0, 8.0])
def test_the_same_tokens_of_as_many_as_large_models_have(deviation: float):
    """Of flat rows most noise is too small to look at, of peaked ones most logits; top-k above and below the pieces."""
    rng = np.random.default_rng(int(deviation))
    x = rng.normal(0, deviation, (NUM_ROWS, 128_256)).astype(np.float32)
    params = mixed(rng)
    params["top_k"] = rng.choice([0, 0, 1, 50, 2004, 2005, 100_000, 200_000], NUM_ROWS)
    of_xla, of_kernel = both(cpu.draw, x, rng.integers(0, 9999, NUM_ROWS).astype(np.int32), **params)
    assert of_kernel == of_xla


@needs_cpu_kernel
def test_of_equal_scores_the_first_is_drawn():
    """Noise has 2**23 values, so that among 128k tokens the highest is there twice in some rows."""
    x = np.zeros((300, 128_256), np.float32)
    of_xla, of_kernel = both(cpu.draw, x, np.arange(300, dtype=np.int32))
    assert of_kernel == of_xla


def test_as_likely_as_min_p_asks_for_is_enough(kernel: Kernel):
    x = np.tile(np.array([-1, 0, 0, -1e-6], np.float32), (NUM_ROWS, 1))
    of_xla, of_kernel = both(kernel, x, np.arange(NUM_ROWS, dtype=np.int32), min_p=1.0)
    assert of_kernel == of_xla and {*of_kernel} == {1, 2}


def test_rows_of_two_data_shards(kernel: Kernel):
    rng = np.random.default_rng(0)
    if len(jax.devices()) < 2:
        pytest.skip("needs two devices")
    x = rng.normal(0, 2, (NUM_ROWS, 300)).astype(np.float32)
    of_xla, of_kernel = both(kernel, x, np.arange(NUM_ROWS, dtype=np.int32), "data:2", **mixed(rng))
    assert of_kernel == of_xla


@pytest.mark.parametrize("top_k", [0, 2])
@pytest.mark.parametrize("top_p", [0.3, 1.0])
def test_ties_and_what_cannot_be(kernel: Kernel, top_k: int, top_p: float):
    """Values that are alike in many tokens, and -inf as logits processors leave it."""
    rng = np.random.default_rng(1)
    x = rng.integers(-2, 3, (NUM_ROWS, 500)).astype(np.float32)
    x[:, rng.permutation(500)[:250]] = -np.inf
    of_xla, of_kernel = both(kernel, x, np.arange(NUM_ROWS, dtype=np.int32), top_k=top_k, top_p=top_p)
    assert of_kernel == of_xla and all(np.isfinite(x[i, token]) for i, token in enumerate(of_kernel))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_that_is_not_finite_ends(kernel: Kernel, bad: float, temperature: float):
    """With some token of the vocabulary; the others are what they are alone."""
    rng = np.random.default_rng(2)
    x = rng.normal(0, 2, (3, 100)).astype(np.float32)
    params, positions = {"temperature": temperature, "top_k": 3, "top_p": 0.7}, np.zeros(3, np.int32)
    alone = both(kernel, x, positions, **params)[1]
    x[1] = bad
    found = both(kernel, x, positions, **params)[1]
    assert [found[0], found[2]] == [alone[0], alone[2]] and 0 <= found[1] < 100


def test_few_of_many_that_are_almost_alike(kernel: Kernel):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1e-3, (4, 20_000)).astype(np.float32)
    params = {"top_k": [3, 3, 0, 3], "top_p": [1, 0.9, 1e-42, 1]}
    of_xla, of_kernel = both(kernel, x, np.arange(4, dtype=np.int32), **params)
    assert of_kernel == of_xla and of_kernel[2] == x[2].argmax()


def test_what_the_flags_switch_off_is_off(kernel: Kernel):
    """As for a step whose tokens are drawn again."""
    x = np.random.default_rng(3).normal(0, 2, (4, 100)).astype(np.float32)
    params = arrays(4, 1.0, 3, 0.5)
    found = sample(jnp.array(x), params._replace(draws=False), jnp.zeros(4, jnp.int32), kernel=kernel)
    assert found.tolist() == x.argmax(-1).tolist()
    without = [
        sample(jnp.array(x), p, jnp.arange(4), kernel=kernel) for p in (params._replace(truncates=False), arrays(4))
    ]
    assert without[0].tolist() == without[1].tolist()


def test_greedy_rows_have_no_noise(monkeypatch: pytest.MonkeyPatch):
    """Their scores are never written: whatever is there is not read."""
    monkeypatch.setattr(triton, "gumbel", lambda seed, position, token_ids: jnp.full(token_ids.shape, jnp.nan))
    x = np.random.default_rng(3).normal(0, 2, (4, 100)).astype(np.float32)
    params = arrays(4, [0.0, 1.0, 0.0, 1.0])
    found = sample(jnp.array(x), params, jnp.zeros(4, jnp.int32), kernel=triton.draw)
    assert np.asarray(found)[[0, 2]].tolist() == x.argmax(-1)[[0, 2]].tolist()
