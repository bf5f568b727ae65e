"""What of paged attention is Hopper's own. Interpretation finds races and reads of memory that nobody wrote, too."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.paged_attention import AttentionSpec, backend, mosaic_gpu
from tests.long_campaign import chosen
from tests.test_paged_attention import TOLERANCES, Case, Device, make, reference


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a Hopper GPU, else interpreted.

    With so many small parts that what is split on a GPU is split here, and a ring that is used again and again.
    """
    if getattr(jax.devices()[0], "compute_capability", "") != "9.0":
        params: Any = plgpu
        if not hasattr(params, "InterpretGPUParams"):
            pytest.skip("this JAX has no public interpreter of kernels for Hopper")  # it has from 0.11 on
        monkeypatch.setattr(mosaic_gpu, "INTERPRET", params.InterpretGPUParams(detect_races=True))
    for name in ("DECODE", "PREFILL"):
        small = dataclasses.replace(getattr(mosaic_gpu, name), extra_items=18, min_blocks=1, num_stages=2)
        monkeypatch.setattr(mosaic_gpu, name, small)


IS_GPU = jax.default_backend() == "gpu"
SPLIT = (Case(4, 2, 64, 16, 1, (64, 1, 65, 330)), "bfloat16")
OPTIONS = (Case(8, 2, 64, 64, 1, (1, 100, 230), window=100, soft_cap=0.5, has_sinks=True), "float16")
RUNS = (
    SPLIT,
    OPTIONS,
    (Case(4, 2, 256, 256, 1, (9, 130, 300), soft_cap=5.0), "bfloat16"),
    (Case(3, 3, 192, 8, 1, (9, 130), has_sinks=True), "bfloat16"),
    (Case(4, 2, 128, 32, 6, (6, 70, 200), window=37), "float16"),
    (Case(7, 1, 128, 128, 1, (64, 300)), "float16"),
    (Case(40, 1, 64, 16, 1, (70, 1, 200), window=100), "bfloat16"),
)


@pytest.mark.any_device
@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(("case", "dtype"), RUNS if IS_GPU else chosen(RUNS, SPLIT, OPTIONS), ids=str)
def test_matches_the_formula_and_never_reads_what_is_masked(case: Case, dtype: str):
    """Unused slots hold NaN, so that reading one shows. The second sequence sees nothing, and its result is zero."""
    arrays = {k: jnp.array(v) for k, v in make(case).items()}
    arrays |= {k: arrays[k].astype(dtype) for k in ("q", "k_pages", "v_pages")}
    arrays["positions"] = arrays["positions"].at[1].set(-1)
    out = jax.jit(functools.partial(mosaic_gpu.paged_attention, spec=case.spec))(**arrays)
    wide = {k: np.asarray(v, v.dtype if v.dtype == np.int32 else np.float64) for k, v in arrays.items()}
    assert not np.asarray(out[1], np.float64).any()
    wide |= {k: np.delete(wide[k], 1, 0) for k in ("q", "block_tables", "positions")}
    _compare(np.delete(out, 1, 0), reference(case, **wide), dtype)


SINKS = (Case(4, 2, 64, 16, 1, (3, 70, 140), has_sinks=True), (2, 0, 37))
RAGGED = (SINKS, (Case(4, 1, 128, 128, 90, (90, 90, 300), window=50, soft_cap=3.0), (3, 70, 90)))


@pytest.mark.any_device
@pytest.mark.usefixtures("running")
@pytest.mark.parametrize(("case", "counts"), RAGGED if IS_GPU else chosen(RAGGED, SINKS), ids=str)
def test_ragged_sequences_match_the_formula(case: Case, counts: tuple[int, ...]):
    """Of each sequence the last `counts` tokens ask; four tokens are padding."""
    dtype, arrays = "bfloat16", make(case)
    q = np.random.default_rng(1).normal(size=(sum(counts) + 4, case.num_q_heads, case.head_dim))
    wide = {k: np.asarray(jnp.array(arrays[k]).astype(dtype), np.float64) for k in ("k_pages", "v_pages")}
    pools = {k: jnp.array(v).astype(dtype) for k, v in wide.items()}
    starts = np.array(case.lengths, np.int32) - counts
    sinks = {"sinks": jnp.array(arrays["sinks"])} if case.has_sinks else {}
    ids = {"block_tables": arrays["block_tables"], "starts": starts, "lengths": np.array(counts, np.int32)}
    attend = jax.jit(functools.partial(mosaic_gpu.ragged_paged_attention, spec=case.spec))
    out = attend(jnp.array(q).astype(dtype), **pools, **jax.tree.map(jnp.array, ids), **sinks)
    end = 0
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        of_sequence = slice(end, end := end + count)
        asked = np.asarray(jnp.array(q[None, of_sequence]).astype(dtype), np.float64)
        table, positions = arrays["block_tables"][row : row + 1], np.arange(start, start + count)[None]
        expected = reference(case, asked, **wide, block_tables=table, positions=positions, **sinks)[0]
        _compare(out[of_sequence], expected, dtype)


def _compare(out: Any, expected: np.ndarray, dtype: str) -> None:
    assert out.dtype == dtype and out.shape == expected.shape
    rtol = TOLERANCES[dtype]
    atol = rtol * np.abs(expected).max(initial=0) / 8
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=rtol, atol=atol)


SPEC = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=128, page_size=16, scale=1.0)
H200 = Device("gpu", "NVIDIA H200", "9.0")


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, H200, None),
        ({}, None, None),
        ({"head_dim": 256, "page_size": 192}, H200, None),
        ({"head_dim": 80}, H200, "it is for a head_dim that is a multiple of 64, up to 256, not 80"),
        ({"head_dim": 320}, None, "it is for a head_dim that is a multiple of 64, up to 256, not 320"),
        ({"page_size": 4}, H200, "it reads 64 tokens at once, and a page_size of 4 does not fit into that"),
        ({"page_size": 48}, H200, "it reads 64 tokens at once, and a page_size of 48 does not fit into that"),
        ({"page_size": 96}, H200, "it reads 64 tokens at once, and a page_size of 96 does not fit into that"),
        (
            {"value_dim": 64},
            H200,
            "it reads values from pages of their own, and here they are the first 64 of the keys",
        ),
        (
            {"context_size": 2},
            H200,
            "it computes no parts that devices merge, and sequences are spread over 2 of them",
        ),
        (
            {"cache_dtype": "int8"},
            H200,
            "its copies go straight to the matrix unit, which does not multiply int8 by the queries",
        ),
        ({"dtype": "float32"}, H200, "the matrix unit that it multiplies with does not take float32"),
        *(
            ({}, device, f"it is for NVIDIA GPUs of compute capability 9, Hopper, and this is {device.device_kind}")
            for device in (
                Device("cpu", "cpu"),
                Device("gpu", "NVIDIA A100", "8.0"),
                Device("gpu", "NVIDIA B200", "10.0"),
                Device("gpu", "AMD MI300X", "gfx942"),
            )
        ),
    ],
    ids=str,
)
def test_says_what_it_cannot_run(changes: dict[str, Any], device: Any, reason: str | None):
    spec = dataclasses.replace(SPEC, **changes)
    assert mosaic_gpu.unsupported(spec, device) == reason
    if reason:
        with pytest.raises(ValueError, match=f"--attention_backend=mosaic_gpu: {reason}"):
            backend("mosaic_gpu", spec, device=device)


def test_float32_is_refused():
    arrays = {k: jnp.array(v) for k, v in make(Case(4, 2, 64, 16, 1, (5,))).items()}
    spec = dataclasses.replace(SPEC, num_q_heads=4, head_dim=64)
    with pytest.raises(ValueError, match="q is float32; expected bfloat16 or float16, or another --attention_backend"):
        mosaic_gpu.paged_attention(**arrays, spec=spec)


@pytest.mark.parametrize(("head_dim", "num_stages"), [(64, 6), (128, 3), (192, 4), (256, 3)])
def test_a_ring_of_at_least_three_blocks_fits_into_shared_memory(head_dim: int, num_stages: int):
    tiling = mosaic_gpu._tiling(dataclasses.replace(SPEC, head_dim=head_dim), 1, itemsize=2)
    assert tiling.tuning.num_stages == num_stages
