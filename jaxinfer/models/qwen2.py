"""Qwen2, Qwen2.5 and QwQ (Yang et al. 2024, arXiv:2407.10671): Llama with biases on queries, keys and values."""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("Qwen2ForCausalLM",)

_TINY = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "use_sliding_window": False,
    "sliding_window": 100,
    "max_window_layers": 1,
    "tie_word_embeddings": False,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "tied": _TINY | {"tie_word_embeddings": True},
    "windows": _TINY | {"use_sliding_window": True},
    "yarn": _TINY
    | {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}, "rope_theta": 10000.0},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "qwen2")
    fields = hf.decoder()
    config = ModelConfig(
        family="qwen2",
        **fields,
        rope=hf.rope(),
        windows=hf.qwen_windows(fields["num_layers"]),
        activation=hf.expect("hidden_act", "silu"),
        attention_bias=True,
    )
    hf.check_all_read()
    return config


Model = Decoder
weight_names = decoder_names
