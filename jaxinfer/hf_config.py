"""Reads config.json with an allow-list, by our own code.

Every key is either read by the family, or known to have no influence on the mathematics of inference, or
an error: a key that we do not understand could be the one that makes the text wrong. Nothing named in the
file is ever imported.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from jaxinfer.config import RopeConfig
from jaxinfer.generation_config import CONFIG_JSON_KEYS
from jaxinfer.hf_rope import is_positive, rope_config
from jaxinfer.model_files import check_files, read_json_object

T = TypeVar("T")

# Keys about training, storage, tokens or the program that wrote the file. `generation_config` reports those of
# CONFIG_JSON_KEYS, which are about sampling.
_IRRELEVANT = CONFIG_JSON_KEYS | frozenset(
    """_attn_implementation _attn_implementation_autoset _name_or_path activation_dropout architectures
    attention_dropout attention_probs_dropout_prob attn_pdrop bos_token_id cache_implementation
    chunk_size_feed_forward classifier_dropout decoder_start_token_id dropout dtype embd_pdrop eos_token_id
    finetuning_task gradient_checkpointing hidden_dropout hidden_dropout_prob id2label init_std initializer_range
    is_decoder label2id layerdrop mlp_dropout output_attentions output_hidden_states output_router_logits
    pad_token_id prefix pretraining_tp problem_type resid_pdrop return_dict router_aux_loss_coef
    router_jitter_noise sep_token_id task_specific_params tokenizer_class torch_dtype torchscript
    transformers_version use_bfloat16 use_cache use_return_dict""".split()
)


# How weights may be stored, by `quant_method`, and the keys of `quantization_config` that we know.
_QUANT_METHODS = {"mxfp4": ("quant_method", "modules_to_not_convert")}
QUANTIZATION_KEY = "quantization_config"


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
        """From a directory of which no file lies elsewhere: what comes later may read it without a look."""
        path = model_dir / "config.json"
        if not path.exists():
            raise ValueError(f"{model_dir}: no config.json there; --model takes a Hugging Face model directory")
        check_files(model_dir)
        return cls(read_json_object(path), str(path))

    def without(self, *keys: str) -> "HFConfig":
        """The same model, without what these say of it."""
        return HFConfig({key: value for key, value in self._values.items() if key not in keys}, self.source)

    @property
    def architecture(self) -> str:
        names = self._values.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or not isinstance(names[0], str):
            raise ValueError(f"{self.source}: architectures must be a list of one name, found {names!r}")
        return names[0]

    @property
    def quant_method(self) -> str | None:
        """How the weights are packed; None: not at all. Raises ValueError for a way that is not implemented."""
        self._read.add(QUANTIZATION_KEY)
        values = self._mapping(QUANTIZATION_KEY, self._values.get(QUANTIZATION_KEY))
        if not values:
            return None
        method = values.get("quant_method")
        if method not in list(_QUANT_METHODS):
            raise ValueError(
                f"{self.source}: {QUANTIZATION_KEY} has quant_method {method!r}, which is not implemented; "
                f"implemented: {', '.join(_QUANT_METHODS)}"
            )
        if unknown := sorted(values.keys() - {*_QUANT_METHODS[method]}):
            raise ValueError(f"{self.source}: {QUANTIZATION_KEY}: {method} does not know {unknown}")
        return method

    def get(self, key: str, kind: type[T], default: T | None = None) -> T:
        """The value of `key`, which must be of type `kind`; null counts as absent. Required without a default.

        Numbers must be positive and finite: they are sizes, counts and a small constant under a root.
        """
        self._read.add(key)
        value = self._values.get(key)
        if value is None:
            if default is None:
                raise ValueError(f"{self.source}: {key} is missing")
            return default
        if kind is float and type(value) is int and is_positive(value):
            value = float(value)
        if type(value) is not kind:
            raise ValueError(f"{self.source}: {key} is {value!r}; expected {kind.__name__}")
        if kind in (int, float) and not is_positive(value):
            raise ValueError(f"{self.source}: {key} is {value!r}; expected a positive number")
        return value

    def get_count(self, key: str) -> int:
        """The value of `key`, which may be 0, and is if it is absent."""
        self._read.add(key)
        return self.get(key, int) if self._values.get(key, 0) != 0 else 0

    def get_or_none(self, key: str, kind: type[T], absent: T | None = None) -> T | None:
        """As `get`, for a key whose null means None, and whose absence means `absent`."""
        self._read.add(key)
        return None if self._values.get(key, absent) is None else self.get(key, kind, absent)

    def get_first(self, keys: Sequence[str], kind: type[T]) -> T:
        """The value of whichever of `keys` is there: names of the same. Raises ValueError where two differ."""
        found = {key: self.get(key, kind) for key in keys if self._values.get(key) is not None}
        if len(set(found.values())) > 1:
            raise ValueError(f"{self.source}: {found} mean the same; expected one value")
        return next(iter(found.values())) if found else self.get(keys[0], kind)

    def decoder(self, *, head_dim: int | None = None, tie_embeddings: bool = False) -> dict[str, Any]:
        """The fields of `ModelConfig` whose keys most families share.

        `head_dim` (None: hidden_size / num_attention_heads) and `tie_embeddings` are the family's defaults.
        """
        embed_dim, num_q_heads = self.get("hidden_size", int), self.get("num_attention_heads", int)
        return {
            "vocab_size": self.get("vocab_size", int),
            "embed_dim": embed_dim,
            "num_layers": self.get("num_hidden_layers", int),
            "num_q_heads": num_q_heads,
            "num_kv_heads": self.get("num_key_value_heads", int, num_q_heads),
            "head_dim": self.get("head_dim", int, head_dim or max(1, embed_dim // num_q_heads)),
            "mlp_dim": self.get("intermediate_size", int),
            "max_position": self.get("max_position_embeddings", int),
            "norm_eps": self.get("rms_norm_eps", float),
            "tie_embeddings": self.get("tie_word_embeddings", bool, tie_embeddings),
        }

    def windows(self, num_layers: int, window: int | None, has_window: Callable[[int], bool]) -> tuple[int | None, ...]:
        """`ModelConfig.windows`, from `layer_types` or, where that is absent, from which layers have one by default."""
        sliding, full = "sliding_attention", "full_attention"
        types = self.get("layer_types", list, [sliding if has_window(layer) else full for layer in range(num_layers)])
        if len(types) != num_layers or not set(map(str, types)) <= {sliding, full}:
            raise ValueError(
                f"{self.source}: layer_types is {types}; expected {num_layers} times {sliding!r} or {full!r}"
            )
        if sliding not in types:
            return ()
        if window is None:
            raise ValueError(f"{self.source}: layer_types has {sliding!r} and there is no sliding_window")
        return tuple(window if kind == sliding else None for kind in types)

    def qwen_windows(self, num_layers: int) -> tuple[int | None, ...]:
        """`windows` in the keys of Qwen 2 and 3: from layer `max_window_layers` on, if they are used at all."""
        self.expect("use_mrope", False)
        window, first = self.get_or_none("sliding_window", int, 4096), self.get("max_window_layers", int, 28)
        is_used = self.get("use_sliding_window", bool, False) and window is not None
        return self.windows(num_layers, window if is_used else None, lambda layer: is_used and layer >= first)

    def expect(self, key: str, *implemented: Any) -> Any:
        """The value of `key`, refused unless it is one of `implemented`; absent counts as the first."""
        self._read.add(key)
        value = self._values.get(key, implemented[0])
        if value not in implemented:
            raise ValueError(
                f"{self.source}: {key}={value!r} is not implemented; implemented: {', '.join(map(repr, implemented))}"
            )
        return value

    def check_all_read(self, *irrelevant: str) -> None:
        """Raises ValueError for keys that are neither read nor irrelevant, here or anywhere (null values aside)."""
        self._check_auto_map()
        _ = self.quant_method  # is the checkpoint's business, if it is one that we know
        self.expect("is_encoder_decoder", False)
        unread = {k for k, v in self._values.items() if v is not None} - self._read - _IRRELEVANT.union(irrelevant)
        if unread:
            raise ValueError(
                f"{self.source}: unknown keys {sorted(unread)} may change the mathematics, so the model is refused; "
                f"remove those that do not"
            )

    def _check_auto_map(self) -> None:
        """A model class in the directory's own files defines the mathematics, whatever `architectures` says."""
        self._read.add("auto_map")
        auto_map = self._mapping("auto_map", self._values.get("auto_map"))
        if models := {key: value for key, value in auto_map.items() if key.startswith("AutoModel")}:
            raise ValueError(
                f"{self.source}: auto_map={models} puts the model's mathematics into the directory's own code, which "
                f"is never run; remove auto_map if the model is a plain {self.architecture}"
            )

    def rope(
        self,
        default_theta: float | None = None,
        *,
        default_share: float | None = None,
        interleaved: bool = False,
        layer_type: str | None = None,
        theta_key: str = "rope_theta",
    ) -> RopeConfig:
        """Rotary embedding from either shape: `rope_theta` + `rope_scaling`, or transformers 5's `rope_parameters`.

        `default_theta` is for a family whose first configs had no key for it. It counts only where the file has
        neither `rope_theta` nor `rope_parameters`. `default_share` is for a family of whose heads a part may rotate.
        `layer_type` is for one whose kinds of layers differ: the new shape has it by kind, and in the old one
        `rope_scaling` is that of full attention, and the others have a `theta_key` of their own.
        """
        old_theta, old_scaling = self._values.get(theta_key), self._values.get("rope_scaling")
        new = self._values.get("rope_parameters")
        self._read |= {theta_key, "rope_scaling", "rope_parameters"}
        if layer_type is not None:
            new = self._mapping("rope_parameters", new).get(layer_type)
            old_scaling = old_scaling if layer_type == "full_attention" else None
        share = 1.0
        if default_share is not None:
            share = self.get("partial_rotary_factor", float, default_share)
            if isinstance(new, dict) and "partial_rotary_factor" in new:
                new = dict(new)
                share = new.pop("partial_rotary_factor")
            if not (is_positive(share) and share <= 1):
                raise ValueError(f"{self.source}: partial_rotary_factor is {share!r}; expected a share of at most 1")
        if new is None:
            values = dict(self._mapping("rope_scaling", old_scaling))
            values["rope_theta"] = default_theta if old_theta is None else old_theta
            if values["rope_theta"] is None:
                raise ValueError(
                    f"{self.source}: neither rope_theta nor rope_parameters is given; there is no safe default"
                )
        else:
            values = dict(self._mapping("rope_parameters", new))
            for key, old in (("rope_theta", old_theta), *self._mapping("rope_scaling", old_scaling).items()):
                if old is not None and values.get(key, old) != old:
                    raise ValueError(f"{self.source}: {key} is {old} here and {values[key]} in rope_parameters")
                if old is not None:
                    values[key] = old
        rope = rope_config(values, self.source)
        return dataclasses.replace(rope, share=float(share), interleaved=interleaved)

    def _mapping(self, key: str, value: Any) -> Mapping[str, Any]:
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"{self.source}: {key} is {value!r}; expected an object")
        return value or {}
