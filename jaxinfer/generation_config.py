"""Reads generation_config.json: how the model's makers want it sampled, and where its output ends. Host only."""

import dataclasses
import json
import pathlib
from typing import Any

# Keys that change nothing when they have this value, or that are about tokens, storage and programs.
_NEUTRAL = {"repetition_penalty": 1.0, "min_p": 0.0, "typical_p": 1.0, "num_beams": 1, "no_repeat_ngram_size": 0}
_IRRELEVANT = frozenset(
    "_from_model_config bos_token_id pad_token_id eos_token_id transformers_version use_cache do_sample "
    "temperature top_k top_p max_length max_new_tokens cache_implementation decoder_start_token_id".split()
)


@dataclasses.dataclass(frozen=True)
class GenerationDefaults:
    """Sampling defaults and end tokens of a model.

    Attributes:
      temperature, top_k, top_p: what the file says, neutral where it says nothing; 0 temperature if it asks not to
        sample.
      eos_token_ids: tokens that end the output.
      ignored: "key=value" of what the file asks for and is not applied, for the user to be told.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    eos_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()


def read_generation_config(model_dir: pathlib.Path) -> GenerationDefaults:
    """The model's defaults; end tokens come from config.json where generation_config.json has none.

    Raises ValueError for a file that cannot be read or a value of the wrong kind.
    """
    values = _read_json(model_dir / "generation_config.json")
    eos = values.get("eos_token_id")
    if eos is None:
        eos = _read_json(model_dir / "config.json").get("eos_token_id")
    path = model_dir / "generation_config.json"
    greedy = values.get("do_sample") is False
    return GenerationDefaults(
        temperature=0.0 if greedy else _number(values, "temperature", 1.0, path),
        top_k=0 if greedy else int(_number(values, "top_k", 0, path)),
        top_p=1.0 if greedy else _number(values, "top_p", 1.0, path),
        eos_token_ids=_token_ids(eos, path),
        ignored=tuple(
            f"{key}={value!r}"
            for key, value in sorted(values.items())
            if key not in _IRRELEVANT and value is not None and _NEUTRAL.get(key, object()) != value
        ),
    )


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object")
    return values


def _number(values: dict[str, Any], key: str, default: float, path: pathlib.Path) -> float:
    value = values.get(key)
    if value is None:
        return default
    if type(value) not in (int, float):
        raise ValueError(f"{path}: {key} is {value!r}; expected a number")
    return value


def _token_ids(value: Any, path: pathlib.Path) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
    if not all(type(i) is int for i in ids):
        raise ValueError(f"{path}: eos_token_id is {value!r}; expected token ids")
    return ids
