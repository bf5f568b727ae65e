"""Model directories for tests: a small random Llama and a byte-level tokenizer, made in milliseconds."""

import json
import pathlib
from typing import Any

import jax.numpy as jnp
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxinfer.checkpoint.hf_writer import write_model
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner

CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 256,
}
END = "<end>"
# Of engines in tests, so that they share their compiled programs: a few slots, and the least that an engine can have.
SIZES = {"max_num_seqs": 4, "max_model_len": 96, "max_num_batched_tokens": 32, "decode_steps": 4, "page_size": 4}
ONE_SLOT = {"max_num_seqs": 1, "max_model_len": 64, "max_num_batched_tokens": 32, "decode_steps": 4}


def make(
    directory: pathlib.Path,
    *,
    with_tokenizer: bool = True,
    chat_template: str | None = None,
    seed: int = 0,
    poisoned_token: int | None = None,
    **overrides: Any,
) -> pathlib.Path:
    """Writes a model into `directory` and returns it; `overrides` are keys of config.json.

    Weights are large enough that greedy text varies. The embedding of `poisoned_token` is NaN.
    """
    values = {**CONFIG, **overrides}
    config = llama.parse_config(HFConfig(values))
    definition = ModelDefinition.create(config, Partitioner.create(), jnp.float32)
    weights = {spec.path: 5.0 * w for spec, w in zip(definition.params, definition.init(seed), strict=True)}
    if poisoned_token is not None:
        weights["embedding/table"] = weights["embedding/table"].at[poisoned_token].set(jnp.nan)
    write_model(directory, values, definition, tuple(weights.values()))
    if with_tokenizer:
        write_tokenizer(directory, chat_template)
    return directory


def write_tokenizer(directory: pathlib.Path, chat_template: str | None = None) -> None:
    """257 tokens: every byte, and an end token that starts each text."""
    vocab = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab, []))
    tokenizer.add_special_tokens([END])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, 256)])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": END, "eos_token": END}
    settings |= {"chat_template": chat_template} if chat_template else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
