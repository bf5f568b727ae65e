"""A prompt in pieces gives the logits that it gives in one."""

import pathlib

import numpy as np
import pytest

from tests import tiny_model
from tests.parity import driver

PROMPTS = [np.random.default_rng(0).integers(0, 256, length).tolist() for length in (100, 5, 33)]
WHOLE = 100


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return tiny_model.make(tmp_path_factory.mktemp("models") / "tiny", with_tokenizer=False)


@pytest.fixture(scope="module")
def whole(model_dir: pathlib.Path) -> list[driver.Continuation]:
    return driver.continue_prompts(model_dir, PROMPTS, 8, WHOLE, num_steps=0)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64])
def test_pieces_give_the_same_logits_and_tokens(chunk: int, model_dir: pathlib.Path, whole: list[driver.Continuation]):
    pieces = driver.continue_prompts(model_dir, PROMPTS, 8, chunk, num_steps=0)
    assert [c.tokens for c in pieces] == [c.tokens for c in whole]
    errors = [np.abs(a.logits - b.logits).max() / np.abs(b.logits).max() for a, b in zip(pieces, whole, strict=True)]
    print(f"chunks of {chunk}: largest relative difference of logits {max(errors):.1e}")
    assert max(errors) < 1e-5
