"""Reads the parameters of rotary embedding in config.json, of each kind those that it has and no others. Host only."""

import sys
from typing import Any

from jaxinfer.config import RopeConfig, yarn_mscale

_ORIGINAL = "original_max_position_embeddings"
_NEEDED = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL),
    "yarn": ("factor", _ORIGINAL),
}
_OPTIONAL = {"yarn": ("beta_fast", "beta_slow", "truncate", "attention_factor", "mscale", "mscale_all_dim")}


def rope_config(values: dict[str, Any], source: str) -> RopeConfig:
    """Of `rope_scaling` or `rope_parameters` with rope_theta in it. Raises ValueError; `source` names the file."""
    named = [name for name in (values.pop("rope_type", None), values.pop("type", None)) if name is not None]
    if len(set(map(repr, named))) > 1:
        raise ValueError(f"{source}: rope_type is {named[0]!r} and type is {named[1]!r}; they mean the same")
    scaling = named[0] if named else "default"
    if scaling not in _NEEDED:
        raise ValueError(f"{source}: rope_type {scaling!r} is not implemented; implemented: {', '.join(_NEEDED)}")
    needed, optional = ["rope_theta", *_NEEDED[scaling]], _OPTIONAL.get(scaling, ())
    given: dict[str, Any] = {k: v for k, v in values.items() if v is not None or k not in optional}
    if any(key in given for key in ("mscale", "mscale_all_dim")):
        needed += ["mscale", "mscale_all_dim"]
    if missing := [key for key in needed if given.get(key) is None]:
        raise ValueError(f"{source}: rope_type {scaling!r} needs {missing}")
    if unknown := sorted(given.keys() - {*needed, *optional}):
        raise ValueError(f"{source}: rope_type {scaling!r} does not know {unknown}")
    truncate = given.pop("truncate", True)
    if type(truncate) is not bool:
        raise ValueError(f"{source}: truncate is {truncate!r}; expected bool")
    for key, value in given.items():
        if not is_positive(value):
            raise ValueError(f"{source}: {key} is {value!r}; expected a positive number")
    if (original := given.get(_ORIGINAL, 1)) != int(original):
        raise ValueError(f"{source}: {_ORIGINAL} is {original!r}; expected an integer")
    if scaling == "yarn" and given["rope_theta"] <= 1:
        raise ValueError(f"{source}: rope_theta is {given['rope_theta']!r}; yarn needs more than 1")
    numbers = {key: float(value) for key, value in given.items()}
    return RopeConfig(
        theta=numbers["rope_theta"],
        scaling=scaling,
        factor=numbers.get("factor", 1.0),
        low_freq_factor=numbers.get("low_freq_factor", 1.0),
        high_freq_factor=numbers.get("high_freq_factor", 1.0),
        original_max_position=int(numbers.get(_ORIGINAL, 0)),
        beta_fast=numbers.get("beta_fast", 32.0),
        beta_slow=numbers.get("beta_slow", 1.0),
        truncate=truncate,
        attention_factor=_attention_factor(numbers) if scaling == "yarn" else 1.0,
        mscale_all_dim=numbers.get("mscale_all_dim", 0.0),
    )


def _attention_factor(numbers: dict[str, float]) -> float:
    """Yarn's, where the file does not say it. DeepSeek has a part of it on all scores, and not on cos and sin."""
    factor = numbers["factor"]
    if "mscale" in numbers:
        default = yarn_mscale(factor, numbers["mscale"]) / yarn_mscale(factor, numbers["mscale_all_dim"])
    else:
        default = yarn_mscale(factor)
    return numbers.get("attention_factor", default)


def is_positive(value: Any) -> bool:
    """Whether it is a number that a float can hold, and neither zero, negative, infinite nor NaN."""
    return type(value) in (int, float) and 0 < value <= sys.float_info.max
