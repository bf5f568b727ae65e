"""Reads generation_config.json by our own code: the sampling that a model's makers recommend, and its end tokens.

End tokens belong to the model and are read in any case; the sampling can be left out. Keys that are present replace
neutral defaults, as in vLLM; transformers would add top_k 50 to a file that samples and does not mention it. What we
cannot do is reported, never dropped.
"""

import dataclasses
import pathlib
from dataclasses import replace
from typing import Any

from jaxinfer.model_files import read_json_object
from jaxinfer.request import MAX_STOP_TOKEN_IDS, SamplingParams

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
# Keys of that kind that old models have in config.json.
CONFIG_JSON_KEYS = frozenset("bad_words_ids begin_suppress_tokens forced_bos_token_id forced_eos_token_id".split())
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
      min_p: 0 is off.
      max_new_tokens: None where the file sets no limit.
      eos_token_ids: any of them ends the text.
      ignored: "key=value" of what the file asks for beyond that; the caller should show it once.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_new_tokens: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    ignored: tuple[str, ...] = ()

    @property
    def sampling_params(self) -> SamplingParams:
        params = SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p, min_p=self.min_p)
        return params if self.max_new_tokens is None else replace(params, max_tokens=self.max_new_tokens)


def read_generation_config(
    model_dir: pathlib.Path, *, vocab_size: int, tokenizer_eos: int | None = None, sampling: bool = True
) -> GenerationDefaults:
    """The file's defaults, neutral ones where there is no file.

    End tokens come from generation_config.json, else from config.json, else they are the tokenizer's one.
    `sampling=False` reads nothing but them. Raises ValueError for a file that is not JSON, for a value out of
    range, and for end tokens that are outside the vocabulary or too many for a request.
    """
    path, config_path = model_dir / "generation_config.json", model_dir / "config.json"
    values, config = (read_json_object(file) if file.exists() else {} for file in (path, config_path))
    if (eos := values.get("eos_token_id")) is not None:
        eos_token_ids = _end_tokens(eos, vocab_size, path)
    elif (eos := config.get("eos_token_id")) is not None:
        eos_token_ids = _end_tokens(eos, vocab_size, config_path)
    else:
        eos_token_ids = _end_tokens([] if tokenizer_eos is None else tokenizer_eos, vocab_size, model_dir)
    if not sampling:
        return GenerationDefaults(eos_token_ids=eos_token_ids)
    numbers = {key: values[key] for key in ("temperature", "top_p", "min_p") if values.get(key) is not None}
    defaults = GenerationDefaults(
        **numbers,
        top_k=_count(values, "top_k", path) or 0,
        max_new_tokens=_count(values, "max_new_tokens", path),
        eos_token_ids=eos_token_ids,
        ignored=_ignored({key: config.get(key) for key in CONFIG_JSON_KEYS} | values),
    )
    try:
        _ = defaults.sampling_params  # which knows what each may be
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return replace(defaults, temperature=0.0) if values.get("do_sample") is False else defaults


def _count(values: dict[str, Any], key: str, path: pathlib.Path) -> int | None:
    """A positive integer; None where the key is absent, 0 or, as some files spell "off", -1."""
    value = values.get(key)
    if value is None:
        return None
    if type(value) is not int or value < -1:
        raise ValueError(f"{path}: {key} is {value!r}; expected a whole number, 0 for off")
    return value if value > 0 else None


def _end_tokens(value: Any, vocab_size: int, source: pathlib.Path) -> tuple[int, ...]:
    """The ids without repetitions. JAX would take one outside the vocabulary for another, or for none."""
    ids = value if isinstance(value, list) else [value]
    if any(type(token_id) is not int or token_id < 0 for token_id in ids):
        raise ValueError(f"{source}: eos_token_id is {value!r}; expected a token id or a list of them")
    ids = tuple(dict.fromkeys(ids))
    if outside := [token_id for token_id in ids if token_id >= vocab_size]:
        raise ValueError(
            f"{source}: eos_token_id names {outside[:5]}, but the model's ids end at {vocab_size - 1} "
            f"(config.json's vocab_size {vocab_size})"
        )
    if len(ids) > MAX_STOP_TOKEN_IDS:
        raise ValueError(f"{source}: eos_token_id names {len(ids)} end tokens; at most {MAX_STOP_TOKEN_IDS}")
    return ids


def _ignored(values: dict[str, Any]) -> tuple[str, ...]:
    read = {"do_sample", "eos_token_id", "max_new_tokens", "min_p", "temperature", "top_k", "top_p"}
    asked = {key: value for key, value in values.items() if value and key not in _IRRELEVANT | read}
    return tuple(f"{key}={value!r}" for key, value in sorted(asked.items()) if value != _NEUTRAL.get(key))
