"""What fits on a device, in bytes worked out by hand."""

import dataclasses
from typing import Any

import pytest

from jaxinfer.planner import (
    MIB,
    EncoderMemoryPlan,
    MemoryNeeds,
    MemoryPlan,
    encoder_workspace_bytes,
    page_bytes,
    plan_memory,
    workspace_bytes,
)

# 3 sequences of 100 tokens in pages of 16: 7 pages each.
ASKED: dict[str, Any] = {
    "weights_bytes": 50_000,
    "workspace_bytes": 10_000,
    "page_bytes": 1_000,
    "page_size": 16,
    "max_model_len": 100,
    "sequences_per_shard": 3,
    "num_shards": 1,
    "context_size": 1,
    "free_bytes": 100_000,
    "memory_fraction": 0.9,
    "kv_cache_bytes": None,
    "unreachable_pages": range(0),
    "kept_bytes": 0,
}


def plan(**changes: Any) -> MemoryPlan:
    asked = ASKED | changes
    needs = MemoryNeeds(**{field.name: asked.pop(field.name) for field in dataclasses.fields(MemoryNeeds)})
    return plan_memory(needs, **asked)


@pytest.mark.parametrize(("start", "stop", "expected"), [(10, 22, 22), (10, 23, 9), (22, 23, 21), (23, 40, 22)])
def test_as_many_pages_as_attention_cannot_read_become_fewer(start: int, stop: int, expected: int):
    """Of 22, which it can if `stop` is not beyond."""
    assert plan(unreachable_pages=range(start, stop)).num_pages == expected


def test_a_page_holds_keys_and_values_of_every_layer():
    assert page_bytes(num_layers=3, token_bytes=2 * 2 * 8 * 4, page_size=16) == 3 * (2 * 2 * 8 * 4) * 16


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 50_000),
        ({"mlp_bytes": 60_000}, 60_000),
        ({"projections_bytes": 70_000}, 70_000),
        ({"residual_bytes": 1_000}, 51_000),
        ({"residual_bytes": 30_000}, 3 * 30_000),
        ({"residual_bytes": 1_000, "num_residuals": 3}, 53_000),
        ({"sampling_bytes": 60_000, "residual_bytes": 1_000}, 60_000),
    ],
)
def test_the_workspace_is_that_of_the_largest_part(changes: dict[str, int], expected: int):
    sizes = {
        "residual_bytes": 0,
        "num_residuals": 1,
        "projections_bytes": 5000,
        "mlp_bytes": 4320,
        "sampling_bytes": 8400,
    }
    assert workspace_bytes(**{"attention_bytes": 50_000, **sizes, **changes}) == expected


@pytest.mark.parametrize(
    ("changes", "num_pages"),
    [
        ({}, 1 + 3 * 7),  # 30 would fit
        ({"free_bytes": None}, 1 + 3 * 7),
        ({"free_bytes": 90_000}, 21),  # 81 000 - 60 000
        ({"free_bytes": 90_000, "workspace_bytes": 0}, 1 + 3 * 7),
        ({"free_bytes": 90_000, "memory_fraction": 1.0, "weights_bytes": 72_000}, 8),
        ({"kv_cache_bytes": 12_999}, 12),
        ({"kv_cache_bytes": 12_999, "free_bytes": None}, 12),
        ({"kv_cache_bytes": 10**9}, 1 + 3 * 7),  # more would not be used
        ({"max_model_len": 112}, 1 + 3 * 7),
        ({"max_model_len": 113}, 1 + 3 * 8),
    ],
)
def test_the_cache_is_what_the_sequences_can_use_as_far_as_memory_goes(changes: dict[str, Any], num_pages: int):
    assert plan(**changes).num_pages == num_pages


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"free_bytes": 75_000},
            r"^48.8 KiB of weights and 9.8 KiB of workspace leave 7500 bytes for the cache of 73.2 KiB free "
            r"on a device \(--memory_fraction=0.9\), less than the 8000 bytes that one sequence of --max_model_len=100 "
            r"needs$",
        ),
        ({"free_bytes": 75_000, "workspace_bytes": 0, "weights_bytes": 60_000}, "^58.6 KiB .* leave 7500 bytes"),
        ({"weights_bytes": 200_000}, "leave 0 bytes for the cache"),
        (
            {"kv_cache_bytes": 7_999},
            "^--kv_cache_bytes=7999 is less than the 8000 bytes that one sequence of --max_model_len=100 needs$",
        ),
        (
            {"kv_cache_bytes": 20_000, "free_bytes": 80_000},
            r"leave 12000 bytes for the cache of 78.1 KiB .*, less than --kv_cache_bytes=20000$",
        ),
    ],
)
def test_what_does_not_fit_says_how_far_it_is_off(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_devices_that_share_a_sequences_pages_hold_them_together():
    """21 pages over four devices: 6 on each, and a scratch page; a sequence's 7 take two of each."""
    over_four = plan(context_size=4)
    assert (over_four.num_pages, over_four.pages_per_shard) == (1 + 6, 4 * 7)
    assert (over_four.num_cache_tokens, over_four.max_concurrency) == (4 * 6 * 16, 3)
    assert plan(context_size=4, free_bytes=70_000).num_pages == 3
    message = r"less than the 3000 bytes that one sequence of --max_model_len=100 needs of each of its 4 devices$"
    for too_little in ({"free_bytes": 69_000}, {"kv_cache_bytes": 2_999}):
        with pytest.raises(ValueError, match=message):
            plan(context_size=4, **too_little)


def test_what_just_fits():
    assert plan(free_bytes=80_000, kv_cache_bytes=12_000).cache_bytes == 12_000
    assert plan(free_bytes=80_000, memory_fraction=0.85).num_pages == 8


def test_the_plan_counts_shards_together_and_prints_every_part():
    of_shards = plan(num_shards=4, weights_bytes=5 * MIB, free_bytes=2**40)
    assert (of_shards.num_cache_tokens, of_shards.max_concurrency) == (4 * 21 * 16, 4 * 3)
    assert str(of_shards) == (
        "memory per device: 5.0 MiB weights + 21.5 KiB cache + 9.8 KiB workspace of 1024.00 GiB free\n"
        "cache: 1344 tokens in 84 pages of 16, 62 B per token; 12 sequences of 100 tokens at once"
    )
    assert str(plan(free_bytes=None)).splitlines()[0].endswith("workspace of unknown free")


def test_an_encoders_workspace_is_scores_or_mlp_and_activations():
    sizes = {"rows": 2, "length": 10, "num_heads": 3, "embed_dim": 7, "itemsize": 2}
    activations = 5 * 2 * 10 * 7 * 2
    assert encoder_workspace_bytes(**sizes, mlp_dim=20) == 3 * 4 * 2 * 3 * 10**2 + activations
    assert encoder_workspace_bytes(**sizes, mlp_dim=1000) == 2 * 2 * 10 * 1000 * 2 + activations


def test_an_encoder_fits_up_to_the_last_byte():
    sizes = {"weights_bytes": 60 * MIB, "workspace_bytes": 30 * MIB}
    EncoderMemoryPlan(**sizes, free_bytes=100 * MIB).check_fits(0.9)
    EncoderMemoryPlan(**sizes, free_bytes=None).check_fits(0.1)
    with pytest.raises(
        ValueError, match=r"^60.0 MiB of weights and 30.0 MiB of workspace .* --max_num_batched_tokens$"
    ):
        EncoderMemoryPlan(**sizes, free_bytes=100 * MIB - 2).check_fits(0.9)
    with pytest.raises(ValueError, match=r"use --dtype=bfloat16, a larger --mesh$"):  # for smaller sizes do not help
        EncoderMemoryPlan(**sizes, free_bytes=60 * MIB).check_fits(0.9)
