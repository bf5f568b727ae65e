"""A device that runs out of memory: said in bytes, beside what was planned."""

import pathlib
from typing import Any

import jax
import pytest

import jaxinfer.engine
from jaxinfer import Engine
from jaxinfer.device_memory import accounted
from jaxinfer.planner import MIB, EncoderMemoryPlan, MemoryPlan
from tests import tiny_model

PLAN = MemoryPlan(
    weights_bytes=50 * MIB,
    workspace_bytes=2 * MIB,
    kept_bytes=0,
    page_bytes=MIB,
    page_size=16,
    max_model_len=64,
    num_shards=1,
    context_size=1,
    free_bytes=100 * MIB,
    num_pages=20,
)


def told(message: str, plan: MemoryPlan | EncoderMemoryPlan = PLAN) -> str:
    with pytest.raises(RuntimeError) as caught, accounted(plan, "compiling"):
        raise jax.errors.JaxRuntimeError(message)
    return str(caught.value)


def test_what_was_wanted_comes_off_the_cache():
    text = told(f"RESOURCE_EXHAUSTED: Out of memory while trying to allocate {3 * MIB} bytes.")
    assert text == (
        "a device ran out of memory while compiling, for 3.0 MiB more; planned per device: 50.0 MiB weights + 20.0 MiB "
        f"cache + 2.0 MiB workspace of 100.0 MiB free; would fit if that is all: --kv_cache_bytes={17 * MIB}"
    )


def test_where_the_cache_has_no_room_to_give():
    """A sequence of 64 tokens takes four pages of 16, beside the scratch page."""
    assert f"--kv_cache_bytes={5 * MIB}" in told(f"RESOURCE_EXHAUSTED: allocating {15 * MIB} bytes")
    assert "a larger --mesh" in told(f"RESOURCE_EXHAUSTED: allocating {16 * MIB} bytes")


def test_without_a_number():
    assert told("RESOURCE_EXHAUSTED: no more").endswith(f"--kv_cache_bytes={18 * MIB}")


def test_an_encoder_has_no_cache():
    plan = EncoderMemoryPlan(weights_bytes=MIB, workspace_bytes=MIB, free_bytes=2 * MIB)
    assert told("RESOURCE_EXHAUSTED", plan).endswith("--max_num_batched_tokens or --memory_fraction")


def test_other_errors_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), accounted(PLAN, "compiling"):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")


def runs_out(*_: Any, **__: Any) -> None:
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: allocating 1024 bytes")


def test_an_engine_says_it_of_its_weights_and_of_its_steps(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    model_dir = str(tiny_model.make(tmp_path / "tiny"))
    with Engine(model_dir, **tiny_model.ONE_SLOT) as engine:
        engine.add_request([1, 2, 3])
        with monkeypatch.context() as patched:
            patched.setattr(engine._core, "step", runs_out)
            with pytest.raises(RuntimeError, match=r"^a device ran out of memory while running a step"):
                engine.step()
    monkeypatch.setattr(jaxinfer.engine, "load_weights", runs_out)
    with pytest.raises(RuntimeError, match=r"while loading and compiling, for 1\.0 KiB more; planned per device: "):
        Engine(model_dir, **tiny_model.ONE_SLOT)
