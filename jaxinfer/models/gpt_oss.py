"""gpt-oss 20b and 120b (OpenAI 2025, arXiv:2508.10925): attention with sinks, and experts with a clamped SwiGLU."""

from jaxinfer.config import ModelConfig, MoEConfig, RopeConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import TensorPart, WeightNames, decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("GptOssForCausalLM",)

_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256, "truncate": False}
_TINY = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
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
    "rope_scaling": _YARN | {"beta_fast": 32.0, "beta_slow": 1.0},
    "attention_bias": True,
    "sliding_window": 100,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "swiglu_limit": 1.5,  # small enough to be reached
    "tie_word_embeddings": False,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "default_rope": {key: value for key, value in _TINY.items() if "rope" not in key}
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}, "attention_bias": False}
    | {"layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 8}
    | {"num_local_experts": 4, "num_experts_per_tok": 3, "swiglu_alpha": 1.3},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "gpt_oss")
    hf.expect("hidden_act", "silu")  # which its SwiGLU has with a factor, whatever this says
    fields = hf.decoder(head_dim=64)
    window, has_bias = hf.get_or_none("sliding_window", int, 128), hf.get("attention_bias", bool, True)
    config = ModelConfig(
        family="gpt_oss",
        **fields,
        rope=_rope(hf),
        windows=hf.windows(fields["num_layers"], window, lambda layer: layer % 2 == 0),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        attention_sinks=True,
        moe=MoEConfig(
            num_experts=hf.get("num_local_experts", int),
            num_experts_per_token=hf.get_first(("num_experts_per_tok", "experts_per_token"), int),
            mlp_dim=fields["mlp_dim"],
            router_bias=True,
            swiglu_limit=hf.get("swiglu_limit", float, 7.0),
            swiglu_alpha=hf.get("swiglu_alpha", float, 1.702),
        ),
    )
    hf.check_all_read()
    return config


def _rope(hf: HFConfig) -> RopeConfig:
    if all(hf.get_or_none(key, dict) is None for key in ("rope_scaling", "rope_parameters")):
        raise ValueError(
            f"{hf.source}: neither rope_scaling nor rope_parameters is given; what is meant may be yarn or no scaling"
        )
    rope = hf.rope()
    if rope.scaling == "yarn":
        hf.expect("initial_context_length", rope.original_max_position, None)  # the same under another name
    return rope


def weight_names(config: ModelConfig) -> WeightNames:
    """Checkpoint tensors of each parameter. Those of experts hold all of them, and are stored [in, out]."""
    names = decoder_names(config)
    for layer in range(config.num_layers):
        ours, theirs = f"layers/{layer}", f"model.layers.{layer}"
        names[f"{ours}/attention/sinks"] = TensorPart(f"{theirs}.self_attn.sinks")
        for name in ("weight", "bias"):
            names[f"{ours}/mlp/router/{name}"] = TensorPart(f"{theirs}.mlp.router.{name}")
        for name in ("gate_up", "down"):
            in_file = f"{theirs}.mlp.experts.{name}_proj"
            names[f"{ours}/mlp/experts/{name}"] = TensorPart(in_file, is_transposed=True)
            names[f"{ours}/mlp/experts/{name}_bias"] = TensorPart(f"{in_file}_bias")
    return names


Model = Decoder
