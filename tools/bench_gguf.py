"""Writes a Llama as GGUF, the file format of llama.cpp, with the weights of its safetensors.

https://github.com/ggml-org/ggml/blob/master/docs/gguf.md names the keys; llama.cpp's convert_hf_to_gguf.py says which
tensor is which.
"""

import json
import pathlib

import gguf  # pyright: ignore[reportMissingImports]
import numpy as np
from safetensors.numpy import load_file

_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_FILE_TYPES = {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16}


def write_llama(model_dir: pathlib.Path, path: pathlib.Path, dtype: str) -> None:
    """Without a tokenizer. Raises ValueError for what is no plain Llama in float32 or float16."""
    about = json.loads((model_dir / "config.json").read_text(encoding="utf-8"))
    if about["model_type"] != "llama" or about.get("rope_scaling") or about.get("attention_bias"):
        raise ValueError(f"{model_dir} is not a plain Llama, which is all that is written as GGUF")
    if dtype not in _FILE_TYPES:
        raise ValueError(f"{dtype} is not written as GGUF; of {', '.join(_FILE_TYPES)} it would be")
    heads, kv_heads = about["num_attention_heads"], about["num_key_value_heads"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(about["max_position_embeddings"])
    writer.add_embedding_length(about["hidden_size"])
    writer.add_block_count(about["num_hidden_layers"])
    writer.add_feed_forward_length(about["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    head_dim = about.get("head_dim") or about["hidden_size"] // heads
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(about["rope_theta"])
    writer.add_layer_norm_rms_eps(about["rms_norm_eps"])
    writer.add_vocab_size(about["vocab_size"])
    writer.add_tokenizer_model("none")
    writer.add_file_type(_FILE_TYPES[dtype])
    for file in sorted(model_dir.glob("*.safetensors")):
        for name, value in load_file(file).items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                value = _interleaved(value, heads if "q_proj" in name else kv_heads)
            writer.add_tensor(_gguf_name(name), value.astype(np.float32 if value.ndim == 1 else dtype))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem.startswith("model.layers."):
        _, _, number, part = stem.split(".", 3)
        return f"blk.{number}.{_NAMES[part]}.weight"
    return f"{_NAMES[stem]}.weight"


def _interleaved(weight: np.ndarray, num_heads: int) -> np.ndarray:
    """Rows in llama.cpp's order: the two that rotary embedding turns together are neighbours, not half a head apart."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)
