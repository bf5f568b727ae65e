"""gpt-oss' config.json: what it leaves unsaid, and what is refused."""

import re
from typing import Any

import pytest

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import gpt_oss


def parse(**changes: Any) -> ModelConfig:
    return gpt_oss.parse_config(HFConfig(gpt_oss.TINY_CONFIGS["gqa"] | changes, "m/config.json"))


def test_defaults_of_absent_keys():
    absent = dict.fromkeys(("swiglu_limit", "head_dim", "attention_bias", "layer_types"))
    config = parse(**absent)
    assert config.moe is not None and (config.moe.swiglu_limit, config.moe.swiglu_alpha) == (7.0, 1.702)
    assert (config.head_dim, config.attention_bias, config.attention_out_bias) == (64, True, True)
    assert config.windows == (100, None)


def test_other_names_of_the_same():
    assert parse(experts_per_token=2, initial_context_length=256) == parse()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_scaling": None}, "neither rope_scaling nor rope_parameters is given; what is meant may be yarn or no"),
        ({"experts_per_token": 4}, "{'num_experts_per_tok': 2, 'experts_per_token': 4} mean the same"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented; implemented: 'silu'"),
        ({"sliding_window": None}, "layer_types has 'sliding_attention' and there is no sliding_window"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(f"m/config.json: {message}")):
        parse(**changes)
