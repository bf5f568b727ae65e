"""Gemma 3's text model (Gemma Team 2025, arXiv:2503.19786): most layers have a window, and rotate at another base."""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import NORMS_ON_BOTH_SIDES, WeightNames, decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("Gemma3ForCausalLM",)

_SLIDING, _FULL = "sliding_attention", "full_attention"
_TINY = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "rope_local_base_freq": 10000.0,
    "query_pre_attn_scalar": 20,  # not head_dim
    "tie_word_embeddings": False,  # with the embedding as its head, a model so small repeats its last token
    "sliding_window": 100,
    "sliding_window_pattern": 2,
}
_BY_KIND = {_SLIDING: {"rope_type": "default", "rope_theta": 5000.0}, _FULL: {"rope_type": "linear", "factor": 8.0}}
TINY_CONFIGS = {
    "gqa": _TINY,
    "linear_rope": _TINY | {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "tie_word_embeddings": True},
    "new_config_shape": {k: v for k, v in _TINY.items() if "rope" not in k and k != "sliding_window_pattern"}
    | {"rope_parameters": _BY_KIND | {_FULL: {**_BY_KIND[_FULL], "rope_theta": 1e6}}}
    | {"layer_types": [_SLIDING, _FULL, _SLIDING], "final_logit_softcapping": 5.0},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "gemma3_text")
    hf.expect("use_bidirectional_attention", False, None)
    hf.expect("attn_logit_softcapping", None)  # transformers, too, takes no notice of it
    fields = hf.decoder(head_dim=256, tie_embeddings=True)
    pattern = hf.get("_sliding_window_pattern", int, hf.get("sliding_window_pattern", int, 6))
    window, has_bias = hf.get_or_none("sliding_window", int, absent=4096), hf.get("attention_bias", bool, False)
    config = ModelConfig(
        family="gemma3",
        **fields,
        rope=hf.rope(1000000.0, layer_type=_FULL),
        window_rope=hf.rope(10000.0, layer_type=_SLIDING, theta_key="rope_local_base_freq"),
        windows=hf.windows(fields["num_layers"], window, lambda layer: (layer + 1) % pattern != 0),
        qk_norm="head",
        activation=hf.expect("hidden_activation", "gelu_pytorch_tanh"),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        query_scale=hf.get("query_pre_attn_scalar", float, 256.0) ** -0.5,
        logits_soft_cap=hf.get_or_none("final_logit_softcapping", float),
        embed_scale=fields["embed_dim"] ** 0.5,
        norms_after=True,
        norm_offset=1.0,
    )
    hf.check_all_read()
    return config


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensor of each parameter."""
    return decoder_names(config, NORMS_ON_BOTH_SIDES)


Model = Decoder
