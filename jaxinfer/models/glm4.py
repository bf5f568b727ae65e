"""GLM-4-0414 (Team GLM 2024, arXiv:2406.12793): half of each head rotates, in pairs of neighbours."""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import WeightNames, decoder_names, fused
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("Glm4ForCausalLM",)

_TINY = {
    "architectures": ["Glm4ForCausalLM"],
    "model_type": "glm4",
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
    "partial_rotary_factor": 0.5,
    "attention_bias": True,
    "tie_word_embeddings": False,
    "pad_token_id": 0,  # the default is beyond this vocabulary
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "no_biases": _TINY | {"attention_bias": False, "num_key_value_heads": 8, "partial_rotary_factor": 1.0},
}
_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_self_attn_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "mlp_post_norm": "post_mlp_layernorm",
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "glm4")
    config = ModelConfig(
        family="glm4",
        **hf.decoder(head_dim=128),
        rope=hf.rope(default_share=0.5, interleaved=True),
        activation=hf.expect("hidden_act", "silu"),
        attention_bias=hf.get("attention_bias", bool, True),
        norms_after=True,
    )
    hf.check_all_read()
    return config


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensor of each parameter, or its part of one."""
    return fused(decoder_names(config, _NORMS), ("gate_proj", "up_proj"), "gate_up_proj")


Model = Decoder
