"""A family that only a test knows: attention and an MLP without a gate, side by side, under tensor names of its own."""

import jax
import jax.numpy as jnp
from flax import nnx

from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import TensorPart, WeightNames
from jaxinfer.layers.attention_block import Attend, AttentionBlock
from jaxinfer.layers.decoder import Decoder, Rope, embed_norm
from jaxinfer.layers.linear import Linear
from jaxinfer.partitioning import Partitioner
from jaxinfer.stages import Layers
from sharding_rules import axes as ax

ARCHITECTURES = ("ToyForCausalLM",)
TINY_CONFIGS = {
    "gqa": {
        "architectures": ["ToyForCausalLM"],
        "model_type": "toy",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "hidden_act": "relu",
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
    }
}


def parse_config(hf: HFConfig) -> ModelConfig:
    hf.expect("model_type", "toy")
    config = ModelConfig(family="toy", **hf.decoder(), rope=hf.rope(), activation=hf.expect("hidden_act", "relu"))
    hf.check_all_read()
    return config


def weight_names(config: ModelConfig) -> WeightNames:
    names = {"embedding/table": "embed.weight", "norm/scale": "last_norm.weight", "head/table": "head.weight"}
    for layer in range(config.num_layers):
        for name in ("attention/q", "attention/k", "attention/v", "attention/out", "up", "down"):
            names[f"layers/{layer}/{name}/weight"] = f"blocks.{layer}.{name.replace('/', '.')}.weight"
        names[f"layers/{layer}/norm/scale"] = f"blocks.{layer}.norm.weight"
    return {path: TensorPart(name) for path, name in names.items()}


class Block(nnx.Module):
    def __init__(
        self, config: ModelConfig, layers: Layers, partitioner: Partitioner, *, dtype: jnp.dtype, rngs: nnx.Rngs
    ):
        del layers  # all are alike
        embed, mlp = ((ax.EMBED, config.embed_dim),), ((ax.MLP, config.mlp_dim),)
        self.norm = embed_norm(config, dtype, rngs)
        self.attention = AttentionBlock(config, partitioner, dtype=dtype, rngs=rngs)
        self.up = Linear(embed, mlp, use_bias=False, dtype=dtype, rngs=rngs)
        self.down = Linear(mlp, embed, use_bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array, rope: Rope, slot: int, attend: Attend) -> jax.Array:
        normal = self.norm(x)
        return x + self.attention(normal, rope, slot, attend) + self.down(jax.nn.relu(self.up(normal)))


class Model(Decoder):
    block_type = Block
