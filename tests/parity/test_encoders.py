"""Every encoder's tiny models against Hugging Face transformers: last activations and pooled vectors close.

Short and long prompts are padded to one length and run in one batch. With PyTorch the comparison is made afresh at
every position; without, with stored activations at some of them.
"""

import pathlib

import numpy as np
import pytest

from tests.parity import driver, encoder_driver, encoder_golden, golden, recipe, reference


@pytest.fixture(scope="module", params=recipe.ENCODER_CASES, ids="-".join)
def case(request: pytest.FixtureRequest) -> tuple[str, str]:
    return request.param


@pytest.fixture(scope="module")
def texts(case: tuple[str, str]) -> list[encoder_golden.Text]:
    return encoder_golden.load(*case)


@pytest.fixture(scope="module")
def model_dir(case: tuple[str, str], tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    hf_config = recipe.tiny_config(*case)
    directory = tmp_path_factory.mktemp(case[1]) / "model"
    return recipe.write_model(directory, hf_config, recipe.weights(case[0], hf_config))


@pytest.fixture(scope="module")
def ours(model_dir: pathlib.Path, texts: list[encoder_golden.Text]) -> list[encoder_driver.Encoding]:
    return encoder_driver.encode(model_dir, [text.prompt for text in texts])


@pytest.fixture(scope="module")
def peer(model_dir: pathlib.Path):
    return reference.load_encoder(model_dir)


def test_matches_golden(ours: list[encoder_driver.Encoding], texts: list[encoder_golden.Text]):
    for mine, text in zip(ours, texts, strict=True):
        error = text.error(mine)
        print(f"{len(text.prompt)} tokens: relative error {error:.1e} at {len(text.positions)} positions")
        assert error < golden.MAX_ERROR


@pytest.mark.parity
def test_matches_live(ours: list[encoder_driver.Encoding], texts: list[encoder_golden.Text], peer):
    for mine, stored in zip(ours, texts, strict=True):
        hidden = reference.hidden(peer, stored.prompt)
        assert hidden.shape == mine.hidden.shape
        error = encoder_golden.Text.of(stored.prompt, hidden, [*range(len(hidden))]).error(mine)
        print(f"{len(stored.prompt)} tokens: relative error {error:.1e} at all {len(hidden)} positions")
        assert error < golden.MAX_ERROR


@pytest.mark.parity
def test_reads_what_transformers_writes(model_dir: pathlib.Path, peer, tmp_path: pathlib.Path):
    """Its config.json has more keys than ours; model and weights must come out the same."""
    peer.save_pretrained(tmp_path)
    assert driver.read_config(tmp_path) == driver.read_config(model_dir)
    definition, weights = driver.load(model_dir)
    _, weights_again = driver.load(tmp_path)
    for spec, array, again in zip(definition.params, weights, weights_again, strict=True):
        np.testing.assert_array_equal(again, array, err_msg=spec.path)


def test_golden_has_no_leftovers():
    names = {path.stem for path in encoder_golden.DIRECTORY.iterdir()}
    assert names == {"__".join(case) for case in recipe.ENCODER_CASES}
