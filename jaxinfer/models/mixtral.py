"""Mixtral 8x7B and 8x22B (Jiang et al. 2024, arXiv:2401.04088): Mistral with eight experts, two for each token."""

from jaxinfer.config import ModelConfig, MoEConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import WeightNames, decoder_names, expert_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("MixtralForCausalLM",)

_TINY = {
    "architectures": ["MixtralForCausalLM"],
    "model_type": "mixtral",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "three_of_four": _TINY
    | {"num_local_experts": 4, "num_experts_per_tok": 3, "sliding_window": 100, "num_key_value_heads": 8},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "mixtral")
    fields, window = hf.decoder(), hf.get_or_none("sliding_window", int)
    config = ModelConfig(
        family="mixtral",
        **fields,
        rope=hf.rope(),
        windows=() if window is None else (window,) * fields["num_layers"],
        activation=hf.expect("hidden_act", "silu"),
        moe=MoEConfig(
            num_experts=hf.get("num_local_experts", int),
            num_experts_per_token=hf.get("num_experts_per_tok", int),
            mlp_dim=fields["mlp_dim"],
        ),
    )
    hf.check_all_read()
    return config


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensors of each parameter."""
    of_experts = {"gate": "w1", "up": "w3", "down": "w2"}
    return decoder_names(config) | expert_names(config, "block_sparse_moe.gate", "block_sparse_moe.experts", of_experts)


Model = Decoder
