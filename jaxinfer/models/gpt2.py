"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners") and what kept its architecture."""

import re
from collections.abc import Collection

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import WeightNames, fused, plain_decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("GPT2LMHeadModel",)
PREFIX = "transformer."

_TINY = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "vocab_size": 128,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 8,
    "n_inner": 96,
    "n_positions": 1024,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "gelu_new",
    "tie_word_embeddings": False,
    "bos_token_id": 0,  # the defaults are beyond this vocabulary
    "eos_token_id": 0,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "tied_gelu": _TINY
    | {"tie_word_embeddings": True, "activation_function": "gelu", "n_inner": None, "n_positions": 800}
    | {"layer_norm_epsilon": 1e-3, "reorder_and_upcast_attn": True},
}
# Of heads for classification, and of old programs that wrote such files.
_IRRELEVANT = """_num_labels output_past predict_special_tokens summary_activation summary_first_dropout
    summary_proj_to_labels summary_type summary_use_proj""".split()
_OUTSIDE = {"embedding": "transformer.wte", "position_embedding": "transformer.wpe", "norm": "transformer.ln_f"}
_INSIDE = {
    "attention_norm": "ln_1",
    "attention/q": "attn.q_attn",
    "attention/k": "attn.k_attn",
    "attention/v": "attn.v_attn",
    "attention/out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "gpt2")
    hf.expect("scale_attn_weights", True)
    hf.expect("scale_attn_by_inverse_layer_idx", False)
    hf.expect("add_cross_attention", False)
    hf.expect("n_special", 0)
    hf.get("reorder_and_upcast_attn", bool, False)  # how float16 is kept from overflow; scores are float32 here
    embed_dim, num_heads, max_position = (hf.get(key, int) for key in ("n_embd", "n_head", "n_positions"))
    hf.expect("n_ctx", max_position)
    config = ModelConfig(
        family="gpt2",
        vocab_size=hf.get("vocab_size", int),
        embed_dim=embed_dim,
        num_layers=hf.get("n_layer", int),
        num_q_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=max(1, embed_dim // num_heads),
        mlp_dim=hf.get("n_inner", int, 4 * embed_dim),
        max_position=max_position,
        norm_eps=hf.get("layer_norm_epsilon", float),
        rope=None,
        learned_positions=max_position,
        activation=hf.expect("activation_function", "gelu_new", "gelu"),
        tie_embeddings=hf.get("tie_word_embeddings", bool, True),
        attention_bias=True,
        attention_out_bias=True,
        mlp_bias=True,
        norm="layer",
        gated_mlp=False,
    )
    hf.check_all_read(*_IRRELEVANT)
    return config


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensor of each parameter, or its part of one. Those of linear layers are transposed."""
    names = plain_decoder_names(config, _OUTSIDE, "transformer.h", _INSIDE)
    names = fused(names, ("q_attn", "k_attn", "v_attn"), "c_attn")
    return {path: part._replace(is_transposed=path.endswith("/weight")) for path, part in names.items()}


def unused_tensors(config: ModelConfig, names: Collection[str]) -> set[str]:
    """Constants of the first files: the causal mask, and what is put where it is zero."""
    del config
    return {name for name in names if re.fullmatch(r"transformer\.h\.\d+\.attn\.(masked_)?bias", name)}


Model = Decoder
