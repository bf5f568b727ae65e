"""generation_config.json: what it sets, what it leaves, what it cannot say silently."""

import json
import pathlib
from typing import Any

import pytest

from jaxinfer.generation_config import GenerationDefaults, read_generation_config
from jaxinfer.request import MAX_STOP_TOKEN_IDS, SamplingParams

VOCAB_SIZE = 100


def read(directory: pathlib.Path, values: Any, config: Any = None, **settings: Any) -> GenerationDefaults:
    (directory / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_generation_config(directory, vocab_size=VOCAB_SIZE, **settings)


def test_no_file_is_neutral(tmp_path: pathlib.Path):
    assert read_generation_config(tmp_path, vocab_size=VOCAB_SIZE) == GenerationDefaults(
        temperature=1.0, top_k=0, top_p=1.0
    )


def test_keys_replace_neutral_defaults(tmp_path: pathlib.Path):
    values = {"do_sample": True, "temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.05}
    defaults = read(tmp_path, values | {"eos_token_id": [5, 7, 5], "max_new_tokens": 64})
    assert defaults == GenerationDefaults(
        temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, eos_token_ids=(5, 7), max_new_tokens=64
    )
    assert defaults.sampling_params == SamplingParams(temperature=0.6, top_k=20, top_p=0.9, min_p=0.05, max_tokens=64)


def test_neutral_defaults_are_those_of_sampling_params(tmp_path: pathlib.Path):
    assert read(tmp_path, {"temperature": 0.6, "min_p": 0.1}, sampling=False).sampling_params == SamplingParams()


@pytest.mark.parametrize(
    ("values", "temperature"), [({"do_sample": False, "temperature": 0.6}, 0.0), ({"temperature": 0.6}, 0.6), ({}, 1.0)]
)
def test_only_do_sample_false_is_greedy(tmp_path: pathlib.Path, values: dict[str, Any], temperature: float):
    assert read(tmp_path, values).temperature == temperature


@pytest.mark.parametrize("off", [0, -1, None])
def test_top_k_off(tmp_path: pathlib.Path, off: int | None):
    assert read(tmp_path, {"top_k": off}).top_k == 0


@pytest.mark.parametrize(
    ("values", "config", "expected"),
    [
        ({"eos_token_id": 3}, {"eos_token_id": 9}, (3,)),
        ({}, {"eos_token_id": [9, 8]}, (9, 8)),
        ({"eos_token_id": None}, {"eos_token_id": 0}, (0,)),
        ({}, {}, ()),
    ],
)
def test_end_tokens_fall_back_to_config_json(
    tmp_path: pathlib.Path, values: dict[str, Any], config: dict[str, Any], expected: tuple[int, ...]
):
    assert read(tmp_path, values, config).eos_token_ids == expected
    assert read(tmp_path, values, config, tokenizer_eos=50).eos_token_ids == (expected or (50,))
    assert read(tmp_path, values, config, sampling=False).eos_token_ids == expected


@pytest.mark.parametrize("where", ["generation_config.json", "config.json"])
@pytest.mark.parametrize(
    ("eos", "message"),
    [
        (VOCAB_SIZE, r"names \[100\], but the model's ids end at 99 \(config.json's vocab_size 100\)"),
        ([1, 2**40], rf"names \[{2**40}\], but"),
        (list(range(MAX_STOP_TOKEN_IDS + 1)), "names 17 end tokens; at most 16"),
    ],
)
def test_end_tokens_that_no_request_could_have_are_refused(tmp_path: pathlib.Path, where: str, eos: Any, message: str):
    files = {"generation_config.json": {}, "config.json": {}} | {where: {"eos_token_id": eos}}
    with pytest.raises(ValueError, match=f"/{where}: eos_token_id {message}"):
        read(tmp_path, *files.values())


def test_as_many_end_tokens_as_a_request_may_have(tmp_path: pathlib.Path):
    ids = [*range(MAX_STOP_TOKEN_IDS), 0, 1]
    assert len(read(tmp_path, {"eos_token_id": ids}).eos_token_ids) == MAX_STOP_TOKEN_IDS


def test_without_sampling_only_end_tokens_are_read(tmp_path: pathlib.Path):
    values = {"temperature": "hot", "top_p": 7, "top_k": -5, "min_p": 0.1, "eos_token_id": 5}
    assert read(tmp_path, values, sampling=False) == GenerationDefaults(eos_token_ids=(5,))


def test_what_config_json_asks_for_is_reported_too(tmp_path: pathlib.Path):
    config = {"bad_words_ids": [[3]], "forced_bos_token_id": 7, "begin_suppress_tokens": [], "hidden_size": 8}
    assert read(tmp_path, {"forced_bos_token_id": 8}, config).ignored == (
        "bad_words_ids=[[3]]",
        "forced_bos_token_id=8",
    )


def test_what_would_change_the_text_is_reported(tmp_path: pathlib.Path):
    values = {"repetition_penalty": 1.05, "min_p": 0.1, "num_beams": 4, "suppress_tokens": [3], "from_the_future": 2}
    assert read(tmp_path, values).ignored == (
        "from_the_future=2",
        "num_beams=4",
        "repetition_penalty=1.05",
        "suppress_tokens=[3]",
    )


def test_what_would_not_is_not(tmp_path: pathlib.Path):
    values = {"repetition_penalty": 1.0, "min_p": None, "num_beams": 1, "suppress_tokens": [], "typical_p": 1.0}
    assert read(tmp_path, values | {"transformers_version": "5.0", "bos_token_id": 1, "max_length": 4096}).ignored == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -0.5}, "temperature=-0.5: must be a number in"),
        ({"temperature": 20_000, "do_sample": False}, "temperature=20000: must be a number in"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 1.5}, r"top_p=1.5: must be a number in \[0, 1\]"),
        ({"top_p": 0}, "top_p=0: must be above 0"),
        ({"min_p": 1.5}, r"min_p=1.5: must be a number in \[0, 1\]"),
        ({"min_p": -0.1}, "min_p=-0.1"),
        ({"top_k": 2**31}, "top_k=2147483648"),
        ({"max_new_tokens": 2**31}, "max_tokens=2147483648"),
        ({"top_k": 2.5}, "top_k is 2.5; expected a whole number"),
        ({"top_k": -2}, "top_k is -2"),
        ({"max_new_tokens": True}, "max_new_tokens is True"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; expected a token id or a list of them"),
        ({"eos_token_id": [1, -1]}, r"eos_token_id is \[1, -1\]"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_bad_values_are_named(tmp_path: pathlib.Path, values: Any, message: str):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, values)


def test_a_file_that_is_not_json_is_named(tmp_path: pathlib.Path):
    (tmp_path / "generation_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match=r"generation_config\.json: not readable JSON"):
        read_generation_config(tmp_path, vocab_size=VOCAB_SIZE)
