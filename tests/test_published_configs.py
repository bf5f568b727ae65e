"""config.json as it was published for models whose family has keys of its own: read, or refused by name."""

import re
from typing import Any

import pytest

from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig

OPT_125M: dict[str, Any] = {
    "_name_or_path": "facebook/opt-125m",
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 3072,
    "hidden_size": 768,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 2048,
    "model_type": "opt",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": 50272,
    "word_embed_proj_dim": 768,
}
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
        (OPT_125M, {"rope_theta": 10000.0}, "unknown keys ['rope_theta'] may change the mathematics"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) and len(value) == 1 else "",
)
def test_refuses(published: dict[str, Any], changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(f"m/config.json: {message}")):
        parse(published | changes)
