"""generation_config.json: what it sets, what it leaves, what it cannot say silently."""

import json
import pathlib
from typing import Any

import pytest

from jaxinfer.generation_config import GenerationDefaults, read_generation_config


def read(directory: pathlib.Path, values: Any, config: Any = None) -> GenerationDefaults:
    (directory / "generation_config.json").write_text(json.dumps(values))
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return read_generation_config(directory)


def test_no_file_is_neutral(tmp_path: pathlib.Path):
    assert read_generation_config(tmp_path) == GenerationDefaults(temperature=1.0, top_k=0, top_p=1.0)


def test_keys_replace_neutral_defaults(tmp_path: pathlib.Path):
    values = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [5, 7, 5], "max_new_tokens": 64}
    assert read(tmp_path, values) == GenerationDefaults(
        temperature=0.6, top_p=0.9, eos_token_ids=(5, 7), max_new_tokens=64
    )


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


def test_what_would_change_the_text_is_reported(tmp_path: pathlib.Path):
    values = {"repetition_penalty": 1.05, "min_p": 0.1, "num_beams": 4, "suppress_tokens": [3], "from_the_future": 2}
    assert read(tmp_path, values).ignored == (
        "from_the_future=2",
        "min_p=0.1",
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
        ({"temperature": -0.5}, "temperature is -0.5; expected a number of at least 0"),
        ({"temperature": float("inf")}, "temperature is inf"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": "hot"}, "temperature is 'hot'"),
        ({"top_p": 1.5}, "top_p is 1.5; expected a number above 0 and at most 1"),
        ({"top_p": 0}, "top_p is 0.0"),
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
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"generation_config\.json: not readable JSON"):
        read_generation_config(tmp_path)
