"""Reads config.json with an allow-list, by our own code.

Every key is either read by the family, or known to have no influence on the mathematics of inference, or
an error: a key that we do not understand could be the one that makes the text wrong. Nothing named in the
file is ever imported.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any, TypeVar

from jaxinfer.config import RopeConfig

T = TypeVar("T")

# Keys about training, storage, tokens or the program that wrote the file.
_IRRELEVANT = frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path architectures attention_dropout auto_map
    bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward decoder_start_token_id dtype
    embd_pdrop eos_token_id finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    hidden_dropout id2label initializer_range is_decoder label2id mlp_dropout model_type output_attentions
    output_hidden_states pad_token_id prefix pretraining_tp problem_type resid_pdrop return_dict sep_token_id
    task_specific_params tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 use_cache
    use_return_dict""".split()
)


class HFConfig:
    """config.json's keys, with a record of those that were read."""

    def __init__(self, values: Mapping[str, Any], source: str = "config.json"):
        if not isinstance(values, dict):
            raise ValueError(f"{source}: expected a JSON object, found {type(values).__name__}")
        self.source = source
        self._values = dict(values)
        self._read: set[str] = set()

    @classmethod
    def read(cls, model_dir: pathlib.Path) -> "HFConfig":
        path = model_dir / "config.json"
        try:
            return cls(json.loads(path.read_text()), str(path))
        except FileNotFoundError:
            raise ValueError(
                f"{model_dir}: no config.json there; --model takes a Hugging Face model directory"
            ) from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: not valid JSON: {error}") from None

    @property
    def architecture(self) -> str:
        names = self._values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(f"{self.source}: architectures must be a list of one name, found {names!r}")
        return names[0]

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`, which must be of type `kind`; null counts as absent. Required without a default."""
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{self.source}: {key} is missing")
            return default
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.source}: {key} is {value!r}; expected {kind.__name__}")
        return value

    def expect(self, key: str, *implemented: Any) -> Any:
        """The value of `key`, refused unless it is one of `implemented`; absent counts as the first."""
        self._read.add(key)
        value = self._values.get(key, implemented[0])
        if value not in implemented:
            raise ValueError(
                f"{self.source}: {key}={value!r} is not implemented; implemented: {', '.join(map(repr, implemented))}"
            )
        return value

    def check_all_read(self) -> None:
        """Raises ValueError for keys that are neither read nor irrelevant (null values aside)."""
        unread = {k for k, v in self._values.items() if v is not None} - self._read - _IRRELEVANT
        if unread:
            raise ValueError(
                f"{self.source}: unknown keys {sorted(unread)} may change the mathematics, so the model is refused; "
                f"remove those that do not"
            )

    def rope(self) -> RopeConfig:
        """Rotary embedding from either shape: `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`."""
        old_theta, old_scaling = self._values.get("rope_theta"), self._values.get("rope_scaling")
        new = self._values.get("rope_parameters")
        self._read |= {"rope_theta", "rope_scaling", "rope_parameters"}
        if new is None:
            values = dict(self._mapping("rope_scaling", old_scaling))
            if old_theta is None:
                raise ValueError(
                    f"{self.source}: neither rope_theta nor rope_parameters is given; there is no safe default"
                )
            values["rope_theta"] = old_theta
        else:
            values = dict(self._mapping("rope_parameters", new))
            for key, old in (("rope_theta", old_theta), *self._mapping("rope_scaling", old_scaling).items()):
                if old is not None and values.get(key, old) != old:
                    raise ValueError(f"{self.source}: {key} is {old} here and {values[key]} in rope_parameters")
                if old is not None:
                    values[key] = old
        return _rope_config(values, self.source)

    def _mapping(self, key: str, value: Any) -> Mapping[str, Any]:
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{self.source}: {key} is {value!r}; expected an object")
        return value or {}


_ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _rope_config(values: dict[str, Any], source: str) -> RopeConfig:
    scaling = values.pop("rope_type", None) or values.get("type") or "default"
    values.pop("type", None)
    if scaling not in _ROPE_KEYS:
        raise ValueError(f"{source}: rope_type {scaling!r} is not implemented; implemented: {', '.join(_ROPE_KEYS)}")
    keys = ("rope_theta", *_ROPE_KEYS[scaling])
    if missing := [key for key in keys if values.get(key) is None]:
        raise ValueError(f"{source}: rope_type {scaling!r} needs {missing}")
    if unknown := sorted(set(values) - set(keys)):
        raise ValueError(f"{source}: rope_type {scaling!r} does not know {unknown}")
    for key in keys:
        if type(values[key]) not in (int, float) or not 0 < values[key] < float("inf"):
            raise ValueError(f"{source}: {key} is {values[key]!r}; expected a positive number")
    return RopeConfig(
        theta=float(values["rope_theta"]),
        scaling=scaling,
        factor=float(values.get("factor", 1.0)),
        low_freq_factor=float(values.get("low_freq_factor", 1.0)),
        high_freq_factor=float(values.get("high_freq_factor", 1.0)),
        original_max_position=int(values.get("original_max_position_embeddings", 0)),
    )
