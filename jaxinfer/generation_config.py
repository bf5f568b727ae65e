"""Reads generation_config.json by our own code: the sampling that a model's makers recommend, and its end tokens.

Keys that are present replace neutral defaults, as in vLLM; transformers would add top_k 50 to a file that samples
and does not mention it. What we cannot do is reported, never dropped.
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

# About speed, storage, training, beam search's bookkeeping or what `generate` returns: not about the next token.
# max_length counts prompt and output together; --max_model_len does that here.
_IRRELEVANT = frozenset(
    """_from_model_config assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight
    assistant_lookbehind bos_token_id cache_config cache_implementation chat_format compile_config
    continuous_batching_config decoder_start_token_id disable_compile early_stopping is_assistant length_penalty
    low_memory max_cache_len max_length max_matching_ngram_size max_time num_assistant_tokens
    num_assistant_tokens_schedule output_attentions output_hidden_states output_logits output_scores pad_token_id
    prefill_chunk_size prompt_lookup_num_tokens remove_invalid_values renormalize_logits return_dict_in_generate
    speculation_type target_lookbehind transformers_version use_cache use_mtp""".split()
)
# Keys that change the text, and the value at which they do not. Null, false and empty are neutral for every key.
_NEUTRAL = {
    "encoder_repetition_penalty": 1,
    "guidance_scale": 1,
    "num_beam_groups": 1,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1,
    "typical_p": 1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationDefaults:
    """How a model's makers would sample from it.

    Attributes:
      temperature: 0 is greedy.
      top_k: 0 is off.
      top_p: 1 is off.
      max_new_tokens: None where the file sets no limit.
      eos_token_ids: any of them ends the text.
      ignored: "key=value" of what the file asks for beyond that; the caller should show it once.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()


def read_generation_config(model_dir: pathlib.Path) -> GenerationDefaults:
    """The file's defaults, neutral ones where there is no file; end tokens may come from config.json instead.

    Raises ValueError for a file that is not JSON and for a value out of range.
    """
    path = model_dir / "generation_config.json"
    values = _read_object(path)
    eos_source = path if values.get("eos_token_id") is not None else model_dir / "config.json"
    eos_values = values if eos_source == path else _read_object(eos_source)
    temperature = _number(values, "temperature", 1.0, path)
    top_p = _number(values, "top_p", 1.0, path)
    if not 0 < top_p <= 1:
        raise ValueError(f"{path}: top_p is {top_p}; expected a number above 0 and at most 1")
    return GenerationDefaults(
        temperature=0.0 if values.get("do_sample") is False else temperature,
        top_k=_count(values, "top_k", path) or 0,
        top_p=top_p,
        max_new_tokens=_count(values, "max_new_tokens", path),
        eos_token_ids=_token_ids(eos_values.get("eos_token_id"), eos_source),
        ignored=_ignored(values),
    )


def _read_object(path: pathlib.Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not readable JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def _number(values: dict[str, Any], key: str, default: float, path: pathlib.Path) -> float:
    value = values.get(key)
    if value is None:
        return default
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ValueError(f"{path}: {key} is {value!r}; expected a number of at least 0")
    return float(value)


def _count(values: dict[str, Any], key: str, path: pathlib.Path) -> int | None:
    """A positive integer; None where the key is absent, 0 or, as some files spell "off", -1."""
    value = values.get(key)
    if value is None:
        return None
    if type(value) is not int or value < -1:
        raise ValueError(f"{path}: {key} is {value!r}; expected a whole number, 0 for off")
    return value if value > 0 else None


def _token_ids(value: Any, path: pathlib.Path) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(token_id) is not int or token_id < 0 for token_id in ids):
        raise ValueError(f"{path}: eos_token_id is {value!r}; expected a token id or a list of them")
    return tuple(dict.fromkeys(ids))


def _ignored(values: dict[str, Any]) -> tuple[str, ...]:
    read = {"do_sample", "eos_token_id", "max_new_tokens", "temperature", "top_k", "top_p"}
    asked = {key: value for key, value in values.items() if value and key not in _IRRELEVANT | read}
    return tuple(f"{key}={value!r}" for key, value in sorted(asked.items()) if value != _NEUTRAL.get(key))
