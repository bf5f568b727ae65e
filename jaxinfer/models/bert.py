"""BERT (Devlin et al. 2018, arXiv:1810.04805), as embedding models such as BGE, E5 and MiniLM are published."""

from collections.abc import Collection

from jaxinfer.config import EncoderConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.hf_weight_names import TensorPart, WeightNames
from jaxinfer.layers.encoder import Encoder

ARCHITECTURES = ("BertModel",)
IS_ENCODER = True

_TINY = {
    "architectures": ["BertModel"],
    "model_type": "bert",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 1024,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
TINY_CONFIGS = {
    "mha": _TINY,
    "gelu_new": _TINY
    | {
        "vocab_size": 131,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 160,
        "hidden_act": "gelu_new",
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-2,
    },
}
_ABOUT_HEADS = """pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
    tie_word_embeddings""".split()

_ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_pytorch_tanh", "gelu_pytorch_tanh": "gelu_pytorch_tanh"}
_TABLES = {
    "embedding/table": "embeddings.word_embeddings.weight",
    "position_embedding/table": "embeddings.position_embeddings.weight",
    "token_type_embedding": "embeddings.token_type_embeddings.weight",
}
_LINEAR = {
    "attention/q": "attention.self.query",
    "attention/k": "attention.self.key",
    "attention/v": "attention.self.value",
    "attention/out": "attention.output.dense",
    "mlp/up": "intermediate.dense",
    "mlp/down": "output.dense",
}
_NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}


def parse_config(hf: HFConfig) -> EncoderConfig:
    """The model that config.json describes; ValueError where it asks for something we do not compute."""
    hf.expect("model_type", "bert")  # others borrow the architecture's name
    hf.expect("position_embedding_type", "absolute")
    hf.expect("is_decoder", False)
    hf.expect("add_cross_attention", False)
    hf.expect("directionality", "bidi")
    embed_dim, num_heads = hf.get("hidden_size", int), hf.get("num_attention_heads", int)
    if embed_dim % num_heads:
        raise ValueError(f"{hf.source}: hidden_size {embed_dim} is not a multiple of num_attention_heads {num_heads}")
    config = EncoderConfig(
        family="bert",
        vocab_size=hf.get("vocab_size", int),
        embed_dim=embed_dim,
        num_layers=hf.get("num_hidden_layers", int),
        num_q_heads=num_heads,
        head_dim=embed_dim // num_heads,
        mlp_dim=hf.get("intermediate_size", int),
        max_position=hf.get("max_position_embeddings", int),
        num_token_types=hf.get("type_vocab_size", int, 2),
        norm_eps=hf.get("layer_norm_eps", float, 1e-12),
        activation=_ACTIVATIONS[hf.expect("hidden_act", *_ACTIVATIONS)],
    )
    hf.check_all_read(*_ABOUT_HEADS)
    return config


def weight_names(config: EncoderConfig) -> WeightNames:
    """Checkpoint tensor of each parameter: "layers/0/mlp/up/weight" -> "encoder.layer.0.intermediate.dense.weight"."""
    names = _TABLES | _norm_names("norm", "embeddings.LayerNorm")
    for layer in range(config.num_layers):
        ours, theirs = f"layers/{layer}", f"encoder.layer.{layer}"
        for name, in_file in _LINEAR.items():
            names |= {f"{ours}/{name}/{part}": f"{theirs}.{in_file}.{part}" for part in ("weight", "bias")}
        for name, in_file in _NORMS.items():
            names |= _norm_names(f"{ours}/{name}", f"{theirs}.{in_file}")
    return {path: TensorPart(name) for path, name in names.items()}


def _norm_names(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}/scale": f"{theirs}.weight", f"{ours}/bias": f"{theirs}.bias"}


def unused_tensors(config: EncoderConfig, names: Collection[str]) -> set[str]:
    """Of no influence on the last hidden state: the head of an objective of training, and a constant."""
    del config
    return {"pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids"} & set(names)


Model = Encoder
