"""Qwen3 (Yang et al. 2025, arXiv:2505.09388): Llama with each head of queries and keys normalised."""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("Qwen3ForCausalLM",)
_HEAD_DIM = 128  # of a file that does not name it

_TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "attention_bias": False,
    "use_sliding_window": False,
    "sliding_window": None,
    "max_window_layers": 2,
    "tie_word_embeddings": False,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "tied_biases": _TINY | {"tie_word_embeddings": True, "attention_bias": True, "num_key_value_heads": 8},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "qwen3")
    fields = hf.decoder(head_dim=_HEAD_DIM)
    has_bias = hf.get("attention_bias", bool, False)
    config = ModelConfig(
        family="qwen3",
        **fields,
        rope=hf.rope(),
        windows=hf.qwen_windows(fields["num_layers"]),
        qk_norm="head",
        activation=hf.expect("hidden_act", "silu"),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
    )
    hf.check_all_read()
    return config


Model = Decoder
weight_names = decoder_names
