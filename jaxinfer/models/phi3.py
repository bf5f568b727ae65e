"""Phi-3 and Phi-4 (Abdin et al. 2024, arXiv:2404.14219 and 2412.08905): Llama with its projections fused on disk.

Not the ones for long contexts, whose longrope scaling is not implemented.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import WeightNames, decoder_names, fused
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("Phi3ForCausalLM",)

_TINY = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "original_max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": None,
    "sliding_window": 100,
    "tie_word_embeddings": False,
    "pad_token_id": 0,  # the default is beyond this vocabulary
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "partial_rope": _TINY
    | {"partial_rotary_factor": 0.75, "num_key_value_heads": 8, "sliding_window": None, "tie_word_embeddings": True},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "phi3")
    hf.expect("attention_bias", False)
    hf.get("original_max_position_embeddings", int, 4096)  # acts through rope_scaling only
    fields = hf.decoder()
    window = hf.get_or_none("sliding_window", int)
    config = ModelConfig(
        family="phi3",
        **fields,
        rope=hf.rope(10000.0, default_share=1.0),
        windows=() if window is None else (window,) * fields["num_layers"],
        activation=hf.expect("hidden_act", "silu"),
    )
    hf.check_all_read()
    return config


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensor of each parameter, or its part of one."""
    names = fused(decoder_names(config), ("q_proj", "k_proj", "v_proj"), "qkv_proj")
    return fused(names, ("gate_proj", "up_proj"), "gate_up_proj")


Model = Decoder
