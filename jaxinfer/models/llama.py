"""Llama 2, 3, 3.1, 3.2 (Touvron et al. 2023, arXiv:2307.09288; Grattafiori et al. 2024, arXiv:2407.21783)."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.layers.attention_block import Attend, AttentionBlock
from jaxinfer.layers.embedding import Embedding
from jaxinfer.layers.mlp import GatedMLP
from jaxinfer.layers.norm import RMSNorm
from jaxinfer.layers.rope import inverse_frequencies, rotation
from jaxinfer.partitioning import Partitioner
from sharding_rules import axes as ax

ARCHITECTURES = ("LlamaForCausalLM",)
_LLAMA2_THETA = 10000.0  # a constant of the code, with no key in the file, when Llama 2 was published

# Few KV heads, a head_dim that is not hidden / heads, and sizes that divide over eight devices.
_TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
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
    "tie_word_embeddings": False,
}
_LLAMA3 = {  # an original length within the tests' contexts, so that the scaling acts
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _without(*keys: str) -> dict[str, object]:
    return {key: value for key, value in _TINY.items() if key not in keys}


TINY_CONFIGS = {
    "gqa": _TINY,
    "mqa": _TINY | {"num_key_value_heads": 1},
    "mha": _TINY | {"num_key_value_heads": 8},
    "head_dim_80": _TINY | {"num_attention_heads": 4, "head_dim": 80},
    "odd_vocab": _TINY | {"vocab_size": 131},
    "tied": _TINY | {"tie_word_embeddings": True},
    "biases": _TINY | {"attention_bias": True, "mlp_bias": True},
    "llama2": _without("num_key_value_heads", "head_dim", "tie_word_embeddings", "rope_theta"),
    "linear_rope": _TINY | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3_rope": _TINY | {"rope_scaling": _LLAMA3},
    "new_config_shape": _without("rope_theta") | {"rope_parameters": {"rope_theta": 500000.0, **_LLAMA3}},
    "new_config_default_rope": _without("rope_theta")
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}},
}


def parse_config(hf: HFConfig) -> ModelConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "llama")  # others borrow the architecture's name, with windows or biases of their own
    embed_dim, num_q_heads = hf.get("hidden_size", int), hf.get("num_attention_heads", int)
    config = ModelConfig(
        family="llama",
        vocab_size=hf.get("vocab_size", int),
        embed_dim=embed_dim,
        num_layers=hf.get("num_hidden_layers", int),
        num_q_heads=num_q_heads,
        num_kv_heads=hf.get("num_key_value_heads", int, num_q_heads),
        head_dim=hf.get("head_dim", int, embed_dim // num_q_heads),
        mlp_dim=hf.get("intermediate_size", int),
        max_position=hf.get("max_position_embeddings", int),
        norm_eps=hf.get("rms_norm_eps", float),
        rope=hf.rope(default_theta=_LLAMA2_THETA),
        activation=hf.expect("hidden_act", "silu"),
        tie_embeddings=hf.get("tie_word_embeddings", bool, False),
        attention_bias=hf.get("attention_bias", bool, False),
        mlp_bias=hf.get("mlp_bias", bool, False),
    )
    hf.check_all_read()
    return config


class Block(nnx.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.attention = AttentionBlock(config, partitioner, dtype=dtype, rngs=rngs)
        self.mlp_norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.mlp = GatedMLP(config, partitioner, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rope: tuple[jax.Array, jax.Array], layer: int, attend: Attend) -> jax.Array:
        with jax.named_scope("attention"):
            x = x + self.attention(self.attention_norm(x), rope, layer, attend)
        with jax.named_scope("mlp"):
            return x + self.mlp(self.mlp_norm(x))


class Model(nnx.Module):
    """The decoder: token ids to the last layer's normalised activations, and those to logits."""

    def __init__(self, config: ModelConfig, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        self.config = config
        self.partitioner = partitioner
        tied, size = config.tie_embeddings, (config.vocab_size, config.embed_dim)
        self.embedding = Embedding(*size, is_head=tied, dtype=dtype, rngs=rngs)
        self.layers = nnx.List([Block(config, partitioner, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)])
        self.norm = RMSNorm(config.embed_dim, eps=config.norm_eps, dtype=dtype, rngs=rngs)
        self.head = None if tied else Embedding(*size, is_head=True, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, positions: jax.Array, attend: Attend) -> jax.Array:
        """tokens, positions int32 [B, T] -> normalised activations [B, T, D]."""
        with jax.named_scope("embed"):
            x = self.partitioner.constrain(self.embedding(tokens), (ax.BATCH, None, ax.EMBED))
        rope = rotation(positions, inverse_frequencies(self.config.rope, self.config.head_dim))
        for layer, block in enumerate(self.layers):
            with jax.named_scope(f"layer_{layer}"):
                x = block(x, rope, layer, attend)
        return self.norm(x)

    def logits(self, hidden: jax.Array) -> jax.Array:
        """[..., D] -> float32 [..., V]."""
        with jax.named_scope("head"):
            return (self.head or self.embedding).logits(hidden)


def weight_names(config: ModelConfig) -> dict[str, str]:
    """Checkpoint tensor of each parameter: "layers/0/mlp/up/weight" -> "model.layers.0.mlp.up_proj.weight"."""
    names = {"embedding/table": "model.embed_tokens.weight", "norm/scale": "model.norm.weight"}
    if not config.tie_embeddings:
        names["head/table"] = "lm_head.weight"
    attention, mlp = ("q", "k", "v", "out"), ("gate", "up", "down")
    for layer in range(config.num_layers):
        ours, theirs = f"layers/{layer}", f"model.layers.{layer}"
        names[f"{ours}/attention_norm/scale"] = f"{theirs}.input_layernorm.weight"
        names[f"{ours}/mlp_norm/scale"] = f"{theirs}.post_attention_layernorm.weight"
        for kind in ("weight", "bias") if config.attention_bias else ("weight",):
            for name in attention:
                names[f"{ours}/attention/{name}/{kind}"] = f"{theirs}.self_attn.{name[0]}_proj.{kind}"
        for kind in ("weight", "bias") if config.mlp_bias else ("weight",):
            for name in mlp:
                names[f"{ours}/mlp/{name}/{kind}"] = f"{theirs}.mlp.{name}_proj.{kind}"
    return names
