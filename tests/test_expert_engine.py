"""Experts as a user sees them: their counts in the metrics, their placement by a file, and what is refused."""

import pathlib

import pytest

from jaxinfer import Engine, SamplingParams, expert_placement
from jaxinfer.engine_config import EngineConfig
from jaxinfer.resolve import resolve
from tests import tiny_model
from tests.parity import recipe

SIZES = {"max_num_seqs": 2, "max_model_len": 32, "max_num_batched_tokens": 32, "decode_steps": 2, "page_size": 16}
CONFIG = recipe.first_config("deepseek") | {"num_hidden_layers": 2}  # of which the second has experts
NUM_EXPERTS, PER_TOKEN = 16, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return recipe.write_model(tmp_path_factory.mktemp("experts") / "model", CONFIG, recipe.weights("deepseek", CONFIG))


def test_counts_of_experts_where_a_file_puts_them(model: pathlib.Path, tmp_path: pathlib.Path):
    """Also of steps whose tokens another program draws again: those with log-probabilities."""
    path, slots = tmp_path / "placement.json", (*range(NUM_EXPERTS), 3, 5)
    expert_placement.write(path, {1: slots})
    prompts = [recipe.prompt(length, 128, length) for length in (3, 7, 11)]
    params = [SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True, logprobs=n) for n in (None, 2, None)]
    with Engine(str(model), mesh="expert:2", expert_counts=True, expert_placement=str(path), **SIZES) as engine:
        assert not engine.metrics().expert_tokens
        engine.generate(prompts, params)
        metrics, moe = engine.metrics(), engine.resolved.definition.decoder_config.moe
    assert moe is not None and moe.placements == ((), slots)
    (counts,) = metrics.expert_tokens.values()
    assert metrics.expert_tokens.keys() == {1} and len(counts) == NUM_EXPERTS
    assert sum(counts) == PER_TOKEN * sum(len(prompt) + 5 for prompt in prompts)
    assert f'jaxinfer_expert_tokens_total{{layer="1",expert="7"}} {counts[7]}\n' in metrics.prometheus_text()


def test_sequences_must_divide_over_all_that_splits_them(model: pathlib.Path):
    with pytest.raises(ValueError, match="--max_num_seqs=6 does not divide over data:2,expert:2; use 8"):
        resolve(EngineConfig(model=str(model), mesh="data:2,expert:2", max_num_seqs=6))


def test_without_experts_there_is_nothing_to_count_to_place_or_to_multiply(tmp_path: pathlib.Path):
    dense = str(tiny_model.make(tmp_path / "dense"))
    with pytest.raises(ValueError, match=r"--expert_counts=True: llama has no experts here; leave it out"):
        resolve(EngineConfig(model=dense, expert_counts=True))
    with pytest.raises(ValueError, match=r"--expert_placement=there\.json: llama has no experts here; leave it out"):
        resolve(EngineConfig(model=dense, expert_placement="there.json"))
    with pytest.raises(ValueError, match=r"--moe_backend=xla: llama has no experts here; leave it out"):
        resolve(EngineConfig(model=dense, moe_backend="xla"))


def test_a_placement_for_one_device_is_refused(model: pathlib.Path, tmp_path: pathlib.Path):
    """By the engine, too, which reads it."""
    (tmp_path / "placement.json").write_text("[]")
    with pytest.raises(ValueError, match="without expert:2 or more in --mesh all experts are on every device"):
        resolve(EngineConfig(model=str(model), mesh="data:2", expert_placement=str(tmp_path / "placement.json")))
