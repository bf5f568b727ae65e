"""What is decided from a model directory and the flags before any memory is allocated."""

import json
import pathlib
from typing import Any

import pytest

from jaxinfer.engine_config import EngineConfig
from jaxinfer.resolve import ResolvedEngine, resolve
from tests import tiny_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Whose end token stands in tokenizer_config.json only."""
    return tiny_model.make(tmp_path_factory.mktemp("resolve") / "model", eos_token_id=None)


def resolve_with(model: pathlib.Path, **settings: Any) -> ResolvedEngine:
    resolved = resolve(EngineConfig(model=str(model), **settings))
    assert isinstance(resolved, ResolvedEngine)
    return resolved


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
