"""Every family's tiny models against Hugging Face transformers: all logits close, all greedy tokens the same.

Through the programs that serve: prompts cached in chunks over scattered pages, then decoded in one batch.
With PyTorch the comparison is made afresh at every position; without, with stored logits at some of them.
"""

import dataclasses
import pathlib

import numpy as np
import pytest

from tests.long_campaign import IS_LONG
from tests.parity import driver, golden, recipe, reference

FIRST = dict(reversed(recipe.CASES))  # of the configs of each family
TWO_PROGRAMS = ("gemma3", "gpt_oss", "deepseek")  # windows, sinks and experts, values in keys


@pytest.fixture(scope="module", params=recipe.CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def sequences(case: tuple[str, str]) -> list[golden.Sequence]:
    return golden.load(*case)


@pytest.fixture(scope="module")
def model_dir(case: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    family, name = case
    hf_config = recipe.tiny_config(family, name)
    return recipe.write_model(tmp_path_factory.mktemp(name) / "model", hf_config, recipe.weights(family, hf_config))


@pytest.fixture(scope="module")
def ours(case: tuple[str, str], model_dir: pathlib.Path, sequences: list[golden.Sequence]) -> list[driver.Continuation]:
    """Llama's first config through the programs that serve as they serve, those of `TWO_PROGRAMS` through both kinds.

    Other families' first through one program, which also decodes; what differs in further configs is not in decoding,
    so that they are given the tokens that follow.
    """
    prompts, (family, name) = [s.prompt for s in sequences], case
    if family == "llama" and name == FIRST[family]:
        return driver.continue_prompts(model_dir, prompts, recipe.NUM_TOKENS, num_steps=16)
    with driver.greedy_only():
        if IS_LONG or (family in TWO_PROGRAMS and name == FIRST[family]):
            return driver.continue_prompts(model_dir, prompts, recipe.NUM_TOKENS)
        if name == FIRST[family]:
            return driver.continue_prompts(model_dir, prompts, recipe.NUM_TOKENS, chunk=64, num_steps=0)
        prompts = [s.prompt + s.tokens[:-1] for s in sequences]
        found = driver.continue_prompts(model_dir, prompts, 1, chunk=128, num_steps=0)
    return [dataclasses.replace(one, tokens=one.logits[-recipe.NUM_TOKENS :].argmax(-1).tolist()) for one in found]


@pytest.fixture(scope="module")
def peer(model_dir: pathlib.Path):
    return reference.load(model_dir)


def test_matches_golden(ours: list[driver.Continuation], sequences: list[golden.Sequence]):
    for mine, theirs in zip(ours, sequences, strict=True):
        error = golden.relative_error(mine.logits[theirs.positions], theirs.logits)
        print(f"{len(theirs.prompt)} tokens: relative error {error:.1e} at {len(theirs.positions)} positions")
        assert error < golden.MAX_ERROR
        assert mine.tokens == theirs.tokens


@pytest.mark.parity
def test_matches_live(ours: list[driver.Continuation], sequences: list[golden.Sequence], peer):
    for mine, stored in zip(ours, sequences, strict=True):
        theirs = reference.logits(peer, stored.prompt + stored.tokens[:-1])
        assert theirs.shape == mine.logits.shape
        assert np.argmax(theirs, axis=-1)[-recipe.NUM_TOKENS :].tolist() == mine.tokens
        error = golden.relative_error(mine.logits, theirs)
        print(f"{len(stored.prompt)} tokens: relative error {error:.1e} at all {len(theirs)} positions")
        assert error < golden.MAX_ERROR


@pytest.mark.parity
def test_reads_what_transformers_writes(model_dir: pathlib.Path, peer, tmp_path: pathlib.Path):
    """Its config.json has more keys and other shapes than ours; model and weights must come out the same."""
    peer.save_pretrained(tmp_path)
    assert driver.read_config(tmp_path) == driver.read_config(model_dir)
    definition, weights = driver.load(model_dir)
    _, weights_again = driver.load(tmp_path)
    for spec, array, again in zip(definition.params, weights, weights_again, strict=True):
        np.testing.assert_array_equal(again, array, err_msg=spec.path)


def test_golden_has_no_leftovers():
    assert {path.stem for path in golden.DIRECTORY.iterdir()} == {"__".join(case) for case in recipe.CASES}
