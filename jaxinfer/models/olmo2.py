"""OLMo 2 (OLMo Team 2025, arXiv:2501.00656): norms behind attention and MLP, and one over all heads before rotation."""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import WeightNames, decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("Olmo2ForCausalLM",)

_TINY = {
    "architectures": ["Olmo2ForCausalLM"],
    "model_type": "olmo2",
    "vocab_size": 128,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 500000.0,
    "attention_bias": False,
    "tie_word_embeddings": False,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "mha": _TINY | {"num_key_value_heads": 8, "rope_theta": 10000.0, "tie_word_embeddings": True},
}
_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "olmo2")
    has_bias = hf.get("attention_bias", bool, False)
    config = ModelConfig(
        family="olmo2",
        **hf.decoder(),
        rope=hf.rope(),
        qk_norm="all",
        activation=hf.expect("hidden_act", "silu"),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        norms_before=False,
        norms_after=True,
    )
    hf.check_all_read()
    return config


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensor of each parameter."""
    return decoder_names(config, _NORMS)


Model = Decoder
