"""Gemma 2 (Gemma Team 2024, arXiv:2408.00118): soft caps, windows in every other layer, norms on both sides."""

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import NORMS_ON_BOTH_SIDES, WeightNames, decoder_names
from jaxinfer.layers.decoder import Decoder

ARCHITECTURES = ("Gemma2ForCausalLM",)

_TINY = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
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
    "rope_theta": 10000.0,
    "query_pre_attn_scalar": 20,  # not head_dim
    "tie_word_embeddings": False,  # with the embedding as its head, a model so small repeats its last token
    "sliding_window": 100,
    "attn_logit_softcapping": 5.0,  # of scores whose standard deviation is 2, so that the cap acts
    "final_logit_softcapping": 5.0,
}
TINY_CONFIGS = {
    "gqa": _TINY,
    "no_caps": _TINY | {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": True},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "gemma2")
    hf.expect("use_bidirectional_attention", None, False)
    hf.expect("hidden_act", "gelu_pytorch_tanh")  # an older name of hidden_activation
    fields = hf.decoder(head_dim=256, tie_embeddings=True)
    window, has_bias = hf.get_or_none("sliding_window", int, absent=4096), hf.get("attention_bias", bool, False)
    hf.expect("sliding_window_size", window)  # an older name of sliding_window
    config = ModelConfig(
        family="gemma2",
        **fields,
        rope=hf.rope(default_theta=10000.0),
        windows=hf.windows(fields["num_layers"], window, lambda layer: layer % 2 == 0),
        activation=hf.expect("hidden_activation", "gelu_pytorch_tanh"),
        attention_bias=has_bias,
        attention_out_bias=has_bias,
        query_scale=hf.get("query_pre_attn_scalar", float, 256.0) ** -0.5,
        attention_soft_cap=hf.get_or_none("attn_logit_softcapping", float, absent=50.0),
        logits_soft_cap=hf.get_or_none("final_logit_softcapping", float, absent=30.0),
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
