"""Llama 2, 3, 3.1, 3.2 (Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783)."""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("LlamaForCausalLM",)
_LLAMA2_THETA = 10000.0  # a constant of the code, with no key in the file, when Llama 2 was published

# Few KV heads, a head_dim that is not hidden / heads, and sizes that divide over eight devices.
_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
_LLAMA3 = {  # an original length within the tests' contexts, so that the scaling acts
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _without(*keys: str) -> dict[str, object]:
    return {key: value for key, value in _TINY.items() if key not in keys}


TINY_CONFIGS = {
    "gqa": _TINY,
    "mqa": _TINY | {"num_key_value_heads": 1},
    "mha": _TINY | {"num_key_value_heads": 8},
    "head_dim_80": _TINY | {"num_attention_heads": 4, "head_dim": 80},
    "odd_vocab": _TINY | {"vocab_size": 131},
    "tied": _TINY | {"tie_word_embeddings": True},
    "biases": _TINY | {"attention_bias": True, "mlp_bias": True},
    "llama2": _without("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta"),
    "linear_rope": _TINY | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3_rope": _TINY | {"rope_scaling": _LLAMA3},
    "new_config_shape": _without("rope_theta") | {"rope_parameters": {"rope_theta": 500000.0, **_LLAMA3}},
    "new_config_default_rope": _without("rope_theta")
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "llama")  # others borrow the architecture's name, with windows or biases of their own
    has_bias = hf.get("attention_bias", bool, False)
    config = ModelConfig(
        family="llama",
        **hf.decoder(),
        rope=hf.rope(default_theta=_LLAMA2_THETA),
        activation=hf.expect("hidden_act", "silu"),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        mlp_bias=hf.get("mlp_bias", bool, False),
    )
    hf.check_all_read()
    return config


Model = Decoder
weight_names = decoder_names
