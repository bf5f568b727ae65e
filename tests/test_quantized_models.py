"""What a model makes of a cache of 8 bits, by every way to run it."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams, kv_cache
from jaxinfer.engine_config import KV_CACHE_DTYPES, EngineConfig
from jaxinfer.resolve import ResolvedEngine, resolve
from pallas_kernels.paged_attention.pages import Pages, quantize
from tests import tiny_model
from tests.parity import driver

PROMPTS = [np.random.default_rng(0).integers(0, 256, length).tolist() for length in (60, 5, 33)]
WHOLE = 60
BOUNDS = {"int8": 0.06, "float8_e4m3fn": 0.2}  # of the difference of logits
SAME = 1e-3  # the same, where a number or two may be rounded the other way by another program


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Heads of 16 numbers, which a matrix unit takes."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    return tiny_model.make(directory, head_dim=16, num_attention_heads=4, max_position_embeddings=128)


@pytest.fixture(scope="module")
def logits(model_dir: pathlib.Path):
    """Of the prompts, [tokens, V] each, by cache and by the tokens of a step."""

    @functools.cache
    def of_cache(cache_dtype: str | None, chunk: int) -> list[np.ndarray]:
        found = driver.continue_prompts(model_dir, PROMPTS, 1, chunk, num_steps=0, cache_dtype=cache_dtype)
        return [continuation.logits for continuation in found]

    return of_cache


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    """Of logits, their root mean square relative to theirs."""
    a, b = np.concatenate(ours), np.concatenate(theirs)
    return float(np.sqrt(np.mean((a - b) ** 2) / np.mean(b**2)))


@pytest.mark.parametrize("cache_dtype", BOUNDS)
def test_logits_stay_near_those_of_a_full_cache(cache_dtype: str, logits):
    """By a model with large weights, which shows small errors. The cache is read also by the step that wrote it."""
    found = difference(logits(cache_dtype, WHOLE), logits(None, WHOLE))
    print(f"{cache_dtype}: relative difference of logits {found:.1e}")
    assert BOUNDS[cache_dtype] / 10 < found < BOUNDS[cache_dtype]


@pytest.mark.parametrize("cache_dtype", BOUNDS)
def test_logits_are_those_of_a_full_cache_of_the_same_numbers(
    cache_dtype: str, logits, monkeypatch: pytest.MonkeyPatch
):
    """So the difference is rounding, and nothing else."""
    write = kv_cache.write

    def write_rounded(pages: jax.Array, new: jax.Array, *where: jax.Array) -> Pages:
        values, scales = quantize(new, cache_dtype)
        return write(pages, values.astype(jnp.float32) * scales[..., None], *where)

    expected = logits(cache_dtype, WHOLE)
    monkeypatch.setattr(kv_cache, "write", write_rounded)
    assert difference(expected, logits.__wrapped__(None, WHOLE)) < SAME


@pytest.mark.parametrize("cache_dtype", BOUNDS)
def test_a_prompt_in_pieces_is_the_prompt_at_once(cache_dtype: str, logits):
    assert difference(logits(cache_dtype, 7), logits(cache_dtype, WHOLE)) < SAME


@pytest.mark.parametrize("mesh", ["data:2,stage:2", "context:2,tensor:2"])
def test_scales_go_where_their_pages_go(mesh: str, model_dir: pathlib.Path):
    """The same tokens as by one device."""
    shapes = driver.Shapes(rows=2, max_len=48, chunk=16, page_size=4, num_steps=4, cache_dtype="int8")
    ours, theirs = (driver.generate_on(model_dir, of, shapes, [3, 30], 10) for of in (mesh, ""))
    assert ours == theirs


def test_an_engine_writes_the_same_again_over_pages_that_it_kept(model_dir: pathlib.Path):
    greedy = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    with Engine(str(model_dir), kv_cache_dtype="int8", **tiny_model.ONE_SLOT) as engine:
        first, again = (engine.generate("abc" * 11, greedy)[0].outputs[0].token_ids for _ in range(2))
        assert engine.metrics().cached_prompt_tokens > 0
    assert first == again


def test_the_plan_says_what_a_token_takes(model_dir: pathlib.Path):
    """Two layers, keys and values of two heads of 16 numbers, each with a scale of 4 bytes; so more tokens fit."""
    sizes = {"model": str(model_dir), "max_num_seqs": 64, "kv_cache_bytes": 200_000}
    for name in KV_CACHE_DTYPES:
        resolved = resolve(EngineConfig(kv_cache_dtype=name, **sizes))
        assert isinstance(resolved, ResolvedEngine)
        token_bytes = 2 * 2 * 2 * (16 * 4 if name == "auto" else 16 + 4)
        assert resolved.memory.page_bytes == 16 * token_bytes
        assert resolved.memory.num_pages == 200_000 // (16 * token_bytes) == resolved.cache_spec.num_pages
        assert f", {token_bytes} B per token" in resolved.summary
        assert (f" over a cache of {KV_CACHE_DTYPES[name]}\n" in resolved.summary) == (name != "auto")
