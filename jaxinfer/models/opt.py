"""OPT (Zhang et al. 2022, arXiv:2205.01068) and Galactica (Taylor et al. 2022, arXiv:2211.09085): learned positions.

Not OPT-350m, whose norms come behind and whose embedding is narrower than its layers.
"""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import WeightNames, plain_decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("OPTForCausalLM",)
PREFIX = "model."
_NORM_EPS = 1e-5  # a constant of the code, with no key in the file
_UNUSED_ROWS = 2  # at the start of the table of positions

_TINY = {
    "architectures": ["OPTForCausalLM"],
    "model_type": "opt",
    "vocab_size": 128,
    "hidden_size": 64,
    "word_embed_proj_dim": 64,
    "ffn_dim": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "max_position_embeddings": 1024,
    "do_layer_norm_before": True,
    "activation_function": "relu",
    "enable_bias": True,
    "tie_word_embeddings": False,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "galactica": _TINY
    | {
        "activation_function": "gelu",
        "enable_bias": False,
        "tie_word_embeddings": True,
        "max_position_embeddings": 800,
    },
}
_OUTSIDE = {
    "embedding": "model.decoder.embed_tokens",
    "position_embedding": "model.decoder.embed_positions",
    "norm": "model.decoder.final_layer_norm",
}
_INSIDE = {
    "attention_norm": "self_attn_layer_norm",
    "attention/q": "self_attn.q_proj",
    "attention/k": "self_attn.k_proj",
    "attention/v": "self_attn.v_proj",
    "attention/out": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp/up": "fc1",
    "mlp/down": "fc2",
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "opt")
    hf.expect("do_layer_norm_before", True)
    hf.expect("_remove_final_layer_norm", False)
    hf.expect("layer_norm_elementwise_affine", True)
    hf.expect("learned_embeddings", True)  # of Galactica, for positions; transformers takes no notice of it
    hf.expect("scale_embeddings", False)  # the same
    embed_dim, num_heads = hf.get("hidden_size", int), hf.get("num_attention_heads", int)
    hf.expect("word_embed_proj_dim", embed_dim, None)
    max_position, has_bias = hf.get("max_position_embeddings", int), hf.get("enable_bias", bool, True)
    config = ModelConfig(
        family="opt",
        vocab_size=hf.get("vocab_size", int),
        embed_dim=embed_dim,
        num_layers=hf.get("num_hidden_layers", int),
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(1, embed_dim // num_heads),
        mlp_dim=hf.get("ffn_dim", int),
        max_position=max_position,
        norm_eps=_NORM_EPS,
        rope=None,
        learned_positions=max_position + _UNUSED_ROWS,
        activation=hf.expect("activation_function", "relu", "gelu"),
        tie_embeddings=hf.get("tie_word_embeddings", bool, True),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        mlp_bias=has_bias,
        norm="layer",
        gated_mlp=False,
    )
    hf.check_all_read()
    return config


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensor of each parameter."""
    return plain_decoder_names(config, _OUTSIDE, "model.decoder.layers", _INSIDE)


Model = Decoder
