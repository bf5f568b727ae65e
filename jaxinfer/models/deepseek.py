"""DeepSeek-V2, V3 and R1 (DeepSeek-AI 2024, arXiv:2405.04434 and 2412.19437): latent attention and shared experts.

Not the multi-token prediction behind V3's last layer.
"""

from collections.abc import Collection

from jaxinfer.config import LatentConfig, ModelConfig, MoEConfig, yarn_mscale
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import PROJECTIONS, WeightNames, decoder_names, expert_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")

_TINY = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 48,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "hidden_act": "silu",
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "n_routed_experts": 16,
    "n_shared_experts": 2,
    "num_experts_per_tok": 4,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "tie_word_embeddings": False,
}
_TINY_V2 = _TINY | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "model_type": "deepseek_v2",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "routed_scaling_factor": 1.5,
    "rope_scaling": {  # an original length within the tests' contexts, so that the scaling acts
        "type": "yarn",
        "factor": 4.0,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.707,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 256,
    },
}
_TINY_V2_LITE = _TINY_V2 | {
    "q_lora_rank": None,
    "topk_method": "greedy",
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "rope_scaling": None,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "v2": _TINY_V2,
    "v2_lite": _TINY_V2_LITE,
    "halves_biases": _TINY | {"rope_interleave": False, "attention_bias": True, "norm_topk_prob": False},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    version = hf.expect("model_type", "deepseek_v3", "deepseek_v2")
    hf.get_count("num_nextn_predict_layers")  # further layers, for guessing several tokens at once
    fields = hf.decoder()
    hf.expect("num_key_value_heads", fields["num_q_heads"])
    latent = LatentConfig(
        kv_rank=hf.get("kv_lora_rank", int),
        q_rank=hf.get_or_none("q_lora_rank", int),
        key_dim=hf.get("qk_nope_head_dim", int),
        rope_dim=hf.get("qk_rope_head_dim", int),
        value_dim=hf.get("v_head_dim", int),
    )
    hf.expect("qk_head_dim", latent.key_dim + latent.rope_dim)
    fields |= {"num_kv_heads": 1, "head_dim": latent.kv_rank + latent.rope_dim}
    has_bias = hf.get("attention_bias", bool, False)
    rope = hf.rope(interleaved=version == "deepseek_v2" or hf.get("rope_interleave", bool, True))
    config = ModelConfig(
        family="deepseek",
        **fields,
        rope=rope,
        activation=hf.expect("hidden_act", "silu"),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        query_scale=(latent.key_dim + latent.rope_dim) ** -0.5 * yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2,
        latent=latent,
        moe=(_moe_v2 if version == "deepseek_v2" else _moe_v3)(hf, fields["num_layers"]),
    )
    hf.check_all_read("aux_loss_alpha", "seq_aux")
    return config


def _moe_v2(hf: HFConfig, num_layers: int) -> MoEConfig:
    """The weights of a token's experts are not made to sum to one."""
    hf.expect("scoring_func", "softmax")
    hf.expect("norm_topk_prob", False)
    hf.expect("mlp_bias", False)
    has_groups = hf.expect("topk_method", "greedy", "group_limited_greedy") == "group_limited_greedy"
    groups, groups_per_token = hf.get("n_group", int, 1), hf.get("topk_group", int, 1)  # null where there are none
    return MoEConfig(
        **_moe_sizes(hf, num_layers),
        normalize=False,
        num_groups=groups if has_groups else 1,
        groups_per_token=groups_per_token if has_groups else 1,
    )


def _moe_v3(hf: HFConfig, num_layers: int) -> MoEConfig:
    """A group is as good as its two best experts."""
    hf.expect("scoring_func", "sigmoid")
    hf.expect("topk_method", "noaux_tc")
    return MoEConfig(
        **_moe_sizes(hf, num_layers),
        scoring="sigmoid",
        normalize=hf.get("norm_topk_prob", bool, True),
        num_groups=hf.get("n_group", int),
        groups_per_token=hf.get("topk_group", int),
        experts_per_group_score=2,
        choice_bias=True,
    )


def _moe_sizes(hf: HFConfig, num_layers: int) -> dict:
    hf.expect("moe_layer_freq", 1)
    hf.expect("ep_size", 1)
    mlp_dim = hf.get("moe_intermediate_size", int)
    return {
        "num_experts": hf.get_first(("n_routed_experts", "num_local_experts"), int),
        "num_experts_per_token": hf.get("num_experts_per_tok", int),
        "mlp_dim": mlp_dim,
        "shared_mlp_dim": mlp_dim * hf.get("n_shared_experts", int),
        "dense_layers": frozenset(range(min(num_layers, hf.get_count("first_k_dense_replace")))),
        "scale": hf.get("routed_scaling_factor", float, 1.0),
    }


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensors of each parameter."""
    return decoder_names(config) | expert_names(config, "mlp.gate", "mlp.experts", PROJECTIONS, "mlp.shared_experts")


def unused_tensors(config: ModelConfig, names: Collection[str]) -> set[str]:
    """The layer behind V3's last that guesses a second token: it has a projection that no other layer has."""
    further = f"model.layers.{config.num_layers}."
    return {name for name in names if name.startswith(further)} if f"{further}eh_proj.weight" in names else set()


Model = Decoder
