"""What other published models of GPT-2's and OPT's families ask for beyond the first: read, or refused by name."""

import re
from typing import Any

import pytest

from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from tests import published

OPT_125M, GPT2 = published.values("opt_125m"), published.values("gpt2")
DEEPSEEK, QWEN = published.values("deepseek_v3"), published.values("qwen_3_30b_a3b")
GPT_OSS = published.values("gpt_oss_20b")
YARN = GPT_OSS["rope_scaling"]
GALACTICA_125M: dict[str, Any] = OPT_125M | {
    "_name_or_path": "galactica-125m",
    "activation_function": "gelu",
    "attention_dropout": 0.1,
    "enable_bias": False,
    "layer_norm_elementwise_affine": True,
    "learned_embeddings": True,
    "scale_embeddings": False,
    "vocab_size": 50000,
}
GPT2_XL: dict[str, Any] = GPT2 | {"n_embd": 1600, "n_head": 25, "n_layer": 48, "output_past": True}
GPT2_MEDIUM: dict[str, Any] = GPT2 | {"n_special": 0, "predict_special_tokens": True}
DISTILGPT2: dict[str, Any] = GPT2 | {
    "_num_labels": 1,
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "n_layer": 6,
}
CEREBRAS_GPT_111M: dict[str, Any] = {
    "activation_function": "gelu",
    "architectures": ["GPT2LMHeadModel"],
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "gpt2",
    "n_embd": 768,
    "n_head": 12,
    "n_inner": 3072,
    "n_layer": 10,
    "n_positions": 2048,
    "reorder_and_upcast_attn": False,
    "resid_pdrop": 0.0,
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
    "use_cache": True,
    "vocab_size": 50257,
}


def parse(values: dict[str, Any]) -> ModelConfig:
    hf = HFConfig(values, "m/config.json")
    return models.for_architecture(hf.architecture).parse_config(hf)


def test_opt():
    config = parse(OPT_125M)
    assert (config.vocab_size, config.embed_dim, config.head_dim, config.mlp_dim) == (50272, 768, 64, 3072)
    assert (config.rope, config.max_position, config.learned_positions) == (None, 2048, 2050)
    assert (config.norm, config.norm_eps, config.gated_mlp, config.activation) == ("layer", 1e-5, False, "relu")
    assert config.attention_bias and config.attention_out_bias and config.mlp_bias and config.tie_embeddings


def test_galactica():
    config = parse(GALACTICA_125M)
    assert not (config.attention_bias or config.attention_out_bias or config.mlp_bias)
    assert config.activation == "gelu"


def test_gpt2():
    config = parse(GPT2)
    assert (config.vocab_size, config.embed_dim, config.head_dim, config.mlp_dim) == (50257, 768, 64, 3072)
    assert (config.rope, config.max_position, config.learned_positions) == (None, 1024, 1024)
    assert (config.norm, config.norm_eps, config.gated_mlp, config.activation) == ("layer", 1e-5, False, "gelu_new")
    assert config.attention_bias and config.attention_out_bias and config.mlp_bias and config.tie_embeddings
    assert parse(GPT2_MEDIUM) == config
    assert parse(GPT2_XL).num_q_heads == 25
    assert parse(DISTILGPT2).num_layers == 6


def test_cerebras_gpt():
    config = parse(CEREBRAS_GPT_111M)
    assert (config.activation, config.mlp_dim, config.learned_positions) == ("gelu", 3072, 2048)


def test_keys_that_say_nothing_new_are_read():
    """As in files for Qwen3-Coder, and in DeepSeek-V3's without the layer that guesses a second token."""
    as_in_coder = {"shared_expert_intermediate_size": 0, "use_qk_norm": True, "qkv_bias": False}
    assert parse(QWEN | as_in_coder) == parse(QWEN)
    assert parse(DEEPSEEK | {"num_nextn_predict_layers": 0}) == parse(DEEPSEEK)
    all_dense = parse(DEEPSEEK | {"first_k_dense_replace": 10**12})  # no list of so many is made
    assert all_dense.moe is not None and len(all_dense.moe.dense_layers) == 61


def test_keys_of_gpt2_alone_may_change_another_familys_mathematics():
    with pytest.raises(ValueError, match=r"unknown keys \['summary_type'\] may change the mathematics"):
        parse(OPT_125M | {"summary_type": "last"})


@pytest.mark.parametrize(
    ("published", "changes", "message"),
    [
        (OPT_125M, {"do_layer_norm_before": False}, "do_layer_norm_before=False is not implemented"),
        (OPT_125M, {"word_embed_proj_dim": 512}, "word_embed_proj_dim=512 is not implemented; implemented: 768"),
        (OPT_125M, {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True is not implemented"),
        (OPT_125M, {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False is not implemented"),
        (OPT_125M, {"learned_embeddings": False}, "learned_embeddings=False is not implemented"),
        (OPT_125M, {"scale_embeddings": True}, "scale_embeddings=True is not implemented"),
        (
            OPT_125M,
            {"activation_function": "silu"},
            "activation_function='silu' is not implemented; implemented: 'relu'",
        ),
        (GPT2, {"scale_attn_weights": False}, "scale_attn_weights=False is not implemented"),
        (GPT2, {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True is not implemented"),
        (GPT2, {"add_cross_attention": True}, "add_cross_attention=True is not implemented"),
        (GPT2, {"n_ctx": 512}, "n_ctx=512 is not implemented; implemented: 1024"),
        (GPT2, {"n_special": 3}, "n_special=3 is not implemented; implemented: 0"),
        (
            GPT2,
            {"activation_function": "relu"},
            "activation_function='relu' is not implemented; implemented: 'gelu_new'",
        ),
        (GPT2, {"n_embd": None}, "n_embd is missing"),
        (DEEPSEEK, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        (DEEPSEEK, {"n_group": None}, "n_group is missing"),
        (DEEPSEEK, {"scoring_func": "softmax"}, "scoring_func='softmax' is not implemented"),
        (QWEN, {"use_sliding_window": True}, "use_sliding_window=True is not implemented"),
        (QWEN, {"shared_expert_intermediate_size": 64}, "shared_expert_intermediate_size=64 is not implemented"),
        (QWEN, {"mlp_only_layers": ["0", 99, 3]}, "mlp_only_layers has ['0', 99]; expected layers from 0 to 47"),
        (GPT_OSS, {"initial_context_length": 777}, "initial_context_length=777 is not implemented; implemented: 4096"),
        (GPT_OSS, {"rope_theta": 1.0}, "rope_theta is 1.0; yarn needs more than 1"),
        (
            GPT_OSS,
            {"rope_scaling": YARN | {"original_max_position_embeddings": 0.5}},
            "original_max_position_embeddings is 0.5; expected an integer",
        ),
        (OPT_125M, {"rope_theta": 10000.0}, "unknown keys ['rope_theta'] may change the mathematics"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_refuses(published: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(f"m/config.json: {message}")):
        parse(published | changes)
