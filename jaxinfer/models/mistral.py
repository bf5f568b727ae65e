"""Mistral 7B and its successors (Jiang et al. 2023, arXiv:2310.06825): Llama with a sliding window."""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("MistralForCausalLM",)
_WINDOW = 4096  # of a file that does not name it; null means none

_TINY = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
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
    "sliding_window": 100,
    "tie_word_embeddings": False,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "no_window": _TINY | {"sliding_window": None, "num_key_value_heads": 8, "rope_theta": 1e6},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "mistral")
    fields = hf.decoder()
    window = hf.get_or_none("sliding_window", int, absent=_WINDOW)
    config = ModelConfig(
        family="mistral",
        **fields,
        rope=hf.rope(),
        windows=() if window is None else (window,) * fields["num_layers"],
        activation=hf.expect("hidden_act", "silu"),
    )
    hf.check_all_read()
    return config


Model = Decoder
weight_names = decoder_names
