"""What is decided from a model directory and the flags before any memory is allocated."""

import json
import pathlib
from typing import Any

import pytest

from jaxinfer import planner
from jaxinfer.engine_config import EngineConfig
from jaxinfer.resolve import ResolvedEngine, resolve
from tests import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Whose end token stands in tokenizer_config.json only."""
    return tiny_model.make(tmp_path_factory.mktemp("resolve") / "model", eos_token_id=None)


def resolve_with(model: pathlib.Path, **settings: Any) -> ResolvedEngine:
    return resolve(EngineConfig(model=str(model), **settings))


def test_a_finetunes_end_token_may_be_the_tokenizers_alone(model: pathlib.Path):
    assert resolve_with(model).generation.eos_token_ids == (256,)


def test_an_end_token_outside_the_vocabulary_is_refused(tmp_path: pathlib.Path):
    model = tiny_model.make(tmp_path / "model", eos_token_id=264)
    with pytest.raises(ValueError, match=f"{model}/config.json: eos_token_id names \\[264\\], but the"):
        resolve_with(model)


def test_without_the_models_generation_config_its_sampling_is_not_read(model: pathlib.Path):
    path = model / "generation_config.json"
    path.write_text(json.dumps({"temperature": "hot", "eos_token_id": [7]}), encoding="utf-8")
    try:
        assert resolve_with(model, generation_config="none").generation.eos_token_ids == (7,)
        with pytest.raises(ValueError, match=f"{path}: temperature='hot'"):
            resolve_with(model)
    finally:
        path.unlink()


def test_sequences_must_divide_over_data(model: pathlib.Path):
    with pytest.raises(ValueError, match="--max_num_seqs=5 does not divide over data:2; use 6"):
        resolve_with(model, mesh="data:2", max_num_seqs=5)
    assert resolve_with(model, mesh="data:2", max_num_seqs=6).slots_per_shard == 3


def plan(**changes: Any) -> planner.MemoryPlan:
    """For one device with 1,000 bytes, of which half may be used."""
    sizes = {"weights_bytes": 300, "slots_bytes": 100, "page_bytes": 10, "page_size": 4, "max_model_len": 16}
    limits = {"free_bytes": 1000, "memory_fraction": 0.5, "kv_cache_bytes": None}
    return planner.plan_memory(**{**sizes, **limits, "sequences_per_shard": 50, "num_shards": 1, **changes})


def test_what_sampling_keeps_of_each_sequence_is_in_the_plan():
    assert plan().num_pages == 10 and plan(slots_bytes=0).num_pages == 20
    assert "300 B weights + 100 B cache + 100 B sampling of 1000 B free" in str(plan())
    with pytest.raises(ValueError, match="weights of 300 B and 201 B for sampling per device do not fit: 1000 B are"):
        plan(slots_bytes=201)
    with pytest.raises(ValueError, match="weights and sampling of 400 B and --kv_cache_bytes=110 exceed the 500 B"):
        plan(kv_cache_bytes=110)
