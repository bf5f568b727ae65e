"""A cache of 8 bits: how near its numbers are, attention over them by every backend, and what a model makes of it."""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import kv_cache
from jaxinfer.attention import attention_specs
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from pallas_kernels.paged_attention import AttentionSpec, backend, backends, merge, triton
from pallas_kernels.paged_attention.pages import LARGEST, QuantizedPages, quantize
from tests import tiny_model
from tests.parity import driver
from tests.test_paged_attention import CASES, TOLERANCES, Case, Device, make, many_small_parts, reference

__all__ = ["many_small_parts"]  # a fixture

INT8, FP8 = LARGEST


def numbers(pages: QuantizedPages) -> np.ndarray:
    """In float64."""
    with np.errstate(invalid="ignore"):
        return np.asarray(pages.values, np.float64) * np.asarray(pages.scales, np.float64)[..., None]


@pytest.mark.parametrize("dtype", LARGEST)
def test_numbers_are_the_nearest_that_their_scale_allows(dtype: str):
    """Vectors of sizes from 1e-30 to 1e30, of some of which one number is much larger than the others."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 3, 16)) * 10 ** rng.uniform(-30, 30, (4000, 3, 1))
    x[::3, :, 0] *= 10 ** rng.uniform(0, 4, (1334, 3))
    x = np.asarray(x, np.float32)
    pages = jax.jit(functools.partial(quantize, dtype=dtype))(x)
    step = np.asarray(pages.scales, np.float64)[..., None]
    error, bound = np.abs(numbers(pages) - x), step / 2
    if dtype == FP8:  # three bits beside the first, and below 2**-6 steps of 2**-9
        bound = np.maximum(np.abs(x) / 2**4, step / 2**10)
    assert (error <= bound * (1 + 1e-4)).all()
    assert (np.abs(np.asarray(pages.values, np.float32)).max(axis=-1) == LARGEST[dtype]).all()
    assert pages.values.dtype == dtype and pages.scales.dtype == jnp.float32


@pytest.mark.parametrize("dtype", LARGEST)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_zeros_stay_and_what_is_not_finite_shows_in_its_own_vector(dtype: str, bad: float):
    x = np.ones((3, 16), np.float32)
    x[0], x[1, 5] = 0, bad
    pages = quantize(jnp.array(x), dtype)
    assert not numbers(pages)[0].any()
    assert not np.isfinite(pages.scales[1]) and np.isnan(numbers(pages)[1]).any()
    np.testing.assert_allclose(numbers(pages)[2], 1, rtol=1e-6)


def quantized(case: Case, q_dtype: str, cache_dtype: str) -> dict[str, Any]:
    """`make`, where slots that must not be read have scales of NaN."""
    arrays: dict[str, Any] = {k: jnp.array(v) for k, v in make(case).items()}
    arrays["q"] = arrays["q"].astype(q_dtype)
    return arrays | {k: quantize(arrays[k], cache_dtype) for k in ("k_pages", "v_pages")}


NAMES = [
    name for name in backends() if not backend(name).unsupported(dataclasses.replace(CASES[0].spec, cache_dtype=INT8))
]
OF_PARTS = [name for name in NAMES if not backend(name).unsupported(dataclasses.replace(CASES[0].spec, context_size=2))]
RUNS = [(CASES[7], "float16", FP8), (CASES[8], "bfloat16", FP8), (CASES[10], "float32", INT8)]


@pytest.mark.any_device
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("case", "q_dtype", "cache_dtype"), RUNS, ids=str)
def test_matches_the_formula_over_what_the_pages_hold(name: str, case: Case, q_dtype: str, cache_dtype: str):
    """As prompts; or as rows, and as a part that is all there is."""
    spec = dataclasses.replace(case.spec, cache_dtype=cache_dtype)
    module, arrays = backend(name, spec), quantized(case, q_dtype, cache_dtype)
    wide = {k: numbers(v) if "pages" in k else np.asarray(v) for k, v in arrays.items()}
    expected = reference(case, **wide | {"q": np.asarray(arrays["q"], np.float64)})
    of_part = dataclasses.replace(spec, context_size=2)

    @jax.jit
    def attend(q, positions, block_tables, sinks=None, **pools) -> list[jax.Array]:
        if case.num_queries > 1:
            prompts = (block_tables, positions[:, 0], jnp.full(len(q), case.num_queries, jnp.int32))
            tokens = q.reshape(-1, *q.shape[2:])
            return [module.ragged_paged_attention(tokens, *pools.values(), *prompts, spec=spec, sinks=sinks)]
        rows = (q, *pools.values(), block_tables)
        out = module.paged_attention(*rows, positions, spec=spec, sinks=sinks)
        if module.unsupported(of_part):
            return [out]
        num_columns = block_tables.shape[1]
        columns = jnp.where(block_tables > 0, jnp.arange(num_columns, dtype=jnp.int32), num_columns)
        part = module.partial_paged_attention(*rows, columns, positions, spec=of_part)
        whole = jax.vmap(lambda part: merge(part, ("context",), sinks, q.dtype), axis_name="context")
        return [out, whole(jax.tree.map(lambda x: x[None], part))]

    rtol = TOLERANCES[q_dtype]
    for out in attend(**arrays):
        assert out.dtype == q_dtype
        out = np.asarray(out, np.float64).reshape(expected.shape)
        np.testing.assert_allclose(out, expected, rtol=rtol, atol=rtol * np.abs(expected).max() / 8)


@pytest.mark.any_device
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("cache_dtype", LARGEST)
def test_values_that_are_the_first_of_the_keys_share_their_scales(name: str, cache_dtype: str):
    case = Case(8, 1, 48, 16, 1, (5, 90, 33))
    arrays = quantized(case, "float32", cache_dtype)
    spec = dataclasses.replace(case.spec, cache_dtype=cache_dtype)
    module = backend(name, spec)
    expected = module.paged_attention(**arrays | {"v_pages": arrays["k_pages"]}, spec=spec)[..., :16]
    out = module.paged_attention(**arrays | {"v_pages": None}, spec=dataclasses.replace(spec, value_dim=16))
    np.testing.assert_allclose(out, expected, atol=1e-5)


@pytest.mark.any_device
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("key", ["k_pages", "v_pages"])
def test_a_scale_that_is_not_finite_stays_in_its_sequence(name: str, key: str):
    case = Case(4, 2, 16, 8, 1, (30, 30, 30))
    spec = dataclasses.replace(case.spec, cache_dtype=INT8)
    arrays = quantized(case, "float32", INT8)
    attend = functools.partial(backend(name, spec).paged_attention, spec=spec)
    whole, pages = np.asarray(attend(**arrays)), arrays[key]
    poisoned = pages._replace(scales=pages.scales.at[arrays["block_tables"][1, 0], :, 3].set(jnp.nan))
    out = np.asarray(attend(**arrays | {key: poisoned}))
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(out[::2], whole[::2])


@pytest.mark.any_device
@pytest.mark.parametrize("name", OF_PARTS)
def test_small_values_are_not_lost_in_float16(name: str):
    """Weights times the scales of small values are less than float16 has. A part comes out in float32."""
    case = Case(2, 1, 16, 16, 1, (90,))
    spec = dataclasses.replace(case.spec, cache_dtype=INT8, context_size=2)
    module, arrays = backend(name, spec), quantized(case, "float16", INT8)
    columns = jnp.arange(arrays["block_tables"].shape[1], dtype=jnp.int32)[None]
    attend = jax.jit(functools.partial(module.partial_paged_attention, columns=columns, spec=spec))
    expected, v_pages = attend(**arrays).out, arrays["v_pages"]
    small = v_pages._replace(scales=v_pages.scales * jnp.float32(2**-20))
    np.testing.assert_allclose(attend(**arrays | {"v_pages": small}).out * 2**20, expected, rtol=1e-6)


@pytest.mark.any_device
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cache_dtype": FP8}, "k_pages is int8, q is float32; expected float8_e4m3fn for AttentionSpec"),
        ({"k_pages": lambda p: p.values}, "k_pages has no scales; expected the other for AttentionSpec"),
        ({"v_pages": lambda p: p._replace(scales=p.scales[:3])}, r"v_pages.scales is float32\(3, 2, 4\); expected "),
        ({"v_pages": lambda p: p._replace(values=p.values[:3])}, r"v_pages has shape \(3, "),
        ({"k_pages": lambda p: p._replace(scales=p.scales.astype(jnp.bfloat16))}, r"k_pages.scales is bfloat16"),
    ],
)  # fmt: skip
def test_pages_that_are_not_as_the_spec_says_are_refused(name: str, change: dict[str, Any], message: str):
    case, arrays = CASES[0], quantized(CASES[0], "float32", INT8)
    spec = dataclasses.replace(case.spec, cache_dtype=change.get("cache_dtype", INT8))
    arrays |= {key: change[key](arrays[key]) for key in arrays.keys() & change.keys()}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(functools.partial(backend(name, spec).paged_attention, spec=spec), **arrays)


def test_an_unknown_dtype_is_refused():
    with pytest.raises(ValueError, match="cache_dtype 'int4' is unknown; known: None, int8, float8_e4m3fn"):
        dataclasses.replace(CASES[0].spec, cache_dtype="int4")


@pytest.mark.parametrize(
    ("num_pages", "is_refused"), [(2**15, False), (2**15 + 1, True), (2**16, True), (2**16 + 1, False)]
)
def test_pools_that_offsets_of_32_bits_do_not_reach_are_refused(num_pages: int, is_refused: bool):
    """Pages of 2**16 numbers of a byte. More than 4 GiB get offsets of 64 bits."""
    spec = AttentionSpec(num_q_heads=8, num_kv_heads=8, head_dim=128, page_size=64, scale=1.0, cache_dtype=INT8)
    array = jax.ShapeDtypeStruct
    pool: Any = QuantizedPages(array((num_pages, 8, 64, 128), jnp.int8), array((num_pages, 8, 64), jnp.float32))  # pyright: ignore[reportArgumentType]
    ids = (array((2, 4), jnp.int32), array((2, 1), jnp.int32))
    attend = functools.partial(jax.eval_shape, functools.partial(triton.paged_attention, spec=spec))
    if is_refused:
        message = f"k_pages has {num_pages} pages; with .* there are 32768 at most, or 65537 at least"
        with pytest.raises(ValueError, match=message):
            attend(array((2, 1, 8, 128), jnp.bfloat16), pool, pool, *ids)
    else:
        attend(array((2, 1, 8, 128), jnp.bfloat16), pool, pool, *ids)


def test_a_gpu_without_numbers_of_8_bits_is_told():
    ampere: Any = Device("gpu", "NVIDIA A100", "8.0")
    int8, fp8 = (dataclasses.replace(CASES[0].spec, cache_dtype=dtype) for dtype in LARGEST)
    assert triton.unsupported(int8, ampere) is None
    assert triton.unsupported(fp8, ampere) == (
        "it is for GPUs of compute capability 8.9 or more for a cache of float8_e4m3fn, and NVIDIA A100 has 8.0"
    )


@pytest.mark.parametrize("mesh", ["", "stage:2,data:2,tensor:2"])
@pytest.mark.parametrize("dtype", [None, *LARGEST])
def test_the_bytes_of_a_token_are_those_of_the_arrays(dtype: str | None, mesh: str, tmp_path: pathlib.Path):
    """On each device, over all its layers. Scales are sharded as their pages are."""
    partitioner = Partitioner.create(mesh)
    config = driver.read_config(tiny_model.make(tmp_path / "tiny", with_tokenizer=False))
    definition = ModelDefinition.create(config, partitioner, jnp.dtype("bfloat16"))
    sizes = {"pages_per_shard": 8, "page_size": 4}
    spec = kv_cache.cache_spec(config, partitioner, **sizes, dtype=jnp.dtype(dtype or definition.dtype))
    arrays = jax.tree.leaves(kv_cache.allocator(spec, partitioner)())
    assert len(arrays) == spec.num_slots * (2 if dtype is None else 4)
    num_bytes = sum(array.addressable_shards[0].data.nbytes for array in arrays)
    (of_layer, *_), *_ = specs = attention_specs(config, partitioner, 4, dtype)
    assert num_bytes == 8 * 4 * len(specs) * of_layer.token_bytes(definition.dtype.itemsize)
