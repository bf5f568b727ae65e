"""Qwen3's mixtures, such as 30B-A3B and 235B-A22B (Yang et al. 2025, arXiv:2505.09388): Qwen3 with many experts."""

from jaxinfer.config import ModelConfig, MoEConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import PROJECTIONS, WeightNames, decoder_names, expert_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("Qwen3MoeForCausalLM",)

_TINY = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
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
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "dense_layers": _TINY  # of the four only the second has experts
    | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3], "norm_topk_prob": False},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "qwen3_moe")
    hf.expect("use_sliding_window", False)
    hf.expect("use_mrope", False)
    hf.expect("use_qk_norm", True)
    hf.expect("qkv_bias", False)
    hf.expect("shared_expert_intermediate_size", 0, None)
    fields = hf.decoder()
    has_bias = hf.get("attention_bias", bool, False)
    config = ModelConfig(
        family="qwen3_moe",
        **fields,
        rope=hf.rope(),
        qk_norm="head",
        activation=hf.expect("hidden_act", "silu"),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        moe=MoEConfig(
            num_experts=hf.get_first(("num_experts", "num_local_experts"), int),
            num_experts_per_token=hf.get("num_experts_per_tok", int),
            mlp_dim=hf.get("moe_intermediate_size", int),
            dense_layers=_dense_layers(hf, fields["num_layers"]),
            normalize=hf.get("norm_topk_prob", bool, False),
        ),
    )
    hf.check_all_read("max_window_layers", "sliding_window")
    return config


def _dense_layers(hf: HFConfig, num_layers: int) -> frozenset[int]:
    """Those that are named, and all but every `decoder_sparse_step`-th."""
    step, named = hf.get("decoder_sparse_step", int, 1), hf.get("mlp_only_layers", list, [])
    if unknown := [layer for layer in named if type(layer) is not int or not 0 <= layer < num_layers]:
        raise ValueError(f"{hf.source}: mlp_only_layers has {unknown}; expected layers from 0 to {num_layers - 1}")
    return frozenset(layer for layer in range(num_layers) if layer in named or (layer + 1) % step)


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensors of each parameter."""
    return decoder_names(config) | expert_names(config, "mlp.gate", "mlp.experts", PROJECTIONS)


Model = Decoder
