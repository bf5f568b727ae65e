"""Which checkpoint tensor holds which parameter, in the naming that most decoders on Hugging Face share. Host only."""

from collections.abc import Mapping
from typing import NamedTuple

from jaxinfer.config import ModelConfig

EXPERT = "{expert}"


class TensorPart(NamedTuple):
    """A checkpoint tensor, or one of several parameters that lie in it one after the other along its rows.

    A name with EXPERT in it stands for as many tensors as there are experts, "0", "1", ... in its place. The rows of a
    transposed tensor, which is stored [in, out], are its last axis.
    """

    name: str  # of the tensor
    place: int = 0  # among the parameters in it
    is_transposed: bool = False


WeightNames = dict[str, TensorPart]  # by the parameter's path

_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
NORMS_ON_BOTH_SIDES = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}

PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def decoder_names(config: ModelConfig, norms: Mapping[str, str] = _NORMS) -> WeightNames:
    """Of `layers.decoder.Decoder`: "layers/0/mlp/up/weight" -> "model.layers.0.mlp.up_proj.weight".

    `norms` has the checkpoint's name of each norm in a block.
    """
    names = {"embedding/table": "model.embed_tokens.weight", "norm/scale": "model.norm.weight"}
    if not config.tie_embeddings:
        names["head/table"] = "lm_head.weight"
    heads = ("q", "k", "v", "out") if config.latent is None else ()
    linear = [(f"attention/{name}", f"self_attn.{name[0]}_proj") for name in heads]
    mlp = [(f"mlp/{name}", f"mlp.{in_file}") for name, in_file in PROJECTIONS.items()]
    has_bias = dict.fromkeys(("attention/q", "attention/k", "attention/v"), config.attention_bias)
    has_bias |= {"attention/out": config.attention_out_bias}
    for layer in range(config.num_layers):
        ours, theirs = f"layers/{layer}", f"model.layers.{layer}"
        for name, in_file in norms.items():
            names[f"{ours}/{name}/scale"] = f"{theirs}.{in_file}.weight"
        for name in ("q_norm", "k_norm") if config.qk_norm else ():
            names[f"{ours}/attention/{name}/scale"] = f"{theirs}.self_attn.{name}.weight"
        for name, in_file in linear if config.has_experts(layer) else linear + mlp:
            names[f"{ours}/{name}/weight"] = f"{theirs}.{in_file}.weight"
            if has_bias.get(name, config.mlp_bias):
                names[f"{ours}/{name}/bias"] = f"{theirs}.{in_file}.bias"
        if config.latent is not None:
            names |= _latent_names(config, f"{ours}/attention", f"{theirs}.self_attn")
    return {path: TensorPart(name) for path, name in names.items()}


def _latent_names(config: ModelConfig, ours: str, theirs: str) -> dict[str, str]:
    """Of `layers.latent_attention.LatentAttention`."""
    assert config.latent is not None
    norms, linear = {"kv_norm": "kv_a_layernorm"}, {"kv_down": "kv_a_proj_with_mqa", "q": "q_proj", "out": "o_proj"}
    if config.latent.q_rank is not None:
        norms |= {"q_norm": "q_a_layernorm"}
        linear |= {"q_down": "q_a_proj", "q": "q_b_proj"}
    names = {f"{ours}/kv_up": f"{theirs}.kv_b_proj.weight"}
    names |= {f"{ours}/{name}/scale": f"{theirs}.{in_file}.weight" for name, in_file in norms.items()}
    names |= {f"{ours}/{name}/weight": f"{theirs}.{in_file}.weight" for name, in_file in linear.items()}
    has_bias = {"kv_down": config.attention_bias, "q_down": config.attention_bias, "out": config.attention_out_bias}
    biased = {name: in_file for name, in_file in linear.items() if has_bias.get(name)}
    return names | {f"{ours}/{name}/bias": f"{theirs}.{in_file}.bias" for name, in_file in biased.items()}


def plain_decoder_names(
    config: ModelConfig, outside: Mapping[str, str], layers: str, inside: Mapping[str, str]
) -> WeightNames:
    """Of a `Decoder` of plain MLPs and layer norms, whose linear layers all have a bias or none.

    `outside` and `inside` have the checkpoint's name of each module outside the layers and in each of them, `layers`
    what those inside begin with: "layers/0/mlp/up/bias" -> "model.decoder.layers.0.fc1.bias".
    """
    modules = dict(outside)
    for layer in range(config.num_layers):
        modules |= {f"layers/{layer}/{ours}": f"{layers}.{layer}.{theirs}" for ours, theirs in inside.items()}
    if not config.tie_embeddings:
        modules["head"] = "lm_head"
    names = {}
    for ours, theirs in modules.items():
        is_table, is_norm = ours.endswith(("embedding", "head")), ours.endswith("norm")
        names[f"{ours}/{'table' if is_table else 'scale' if is_norm else 'weight'}"] = f"{theirs}.weight"
        if is_norm or (config.mlp_bias and not is_table):
            names[f"{ours}/bias"] = f"{theirs}.bias"
    return {path: TensorPart(name) for path, name in names.items()}


def expert_names(
    config: ModelConfig, router: str, experts: str, projections: Mapping[str, str], shared: str = ""
) -> WeightNames:
    """Of layers with experts, a tensor for each: "layers/0/mlp/experts/up" -> "model.layers.0.mlp.experts.7.up_proj".

    `router`, `experts` and `shared` are their places in a layer, `projections` the names of gate, up and down.
    """
    assert config.moe is not None
    names = {}
    for layer in config.expert_layers:
        ours, theirs = f"layers/{layer}/mlp", f"model.layers.{layer}"
        names[f"{ours}/router/weight"] = TensorPart(f"{theirs}.{router}.weight")
        if config.moe.choice_bias:
            names[f"{ours}/router/choice_bias"] = TensorPart(f"{theirs}.{router}.e_score_correction_bias")
        for name, in_file in projections.items():
            if shared:
                names[f"{ours}/shared/{name}/weight"] = TensorPart(f"{theirs}.{shared}.{in_file}.weight")
            names[f"{ours}/experts/{name}"] = TensorPart(f"{theirs}.{experts}.{EXPERT}.{in_file}.weight")
    return names


def fused(names: WeightNames, parts: tuple[str, ...], whole: str) -> WeightNames:
    """`names` with the tensors `parts` as one called `whole`: ("gate_proj", "up_proj") -> "gate_up_proj"."""

    def fuse(name: str) -> TensorPart:
        for index, part in enumerate(parts):
            if f".{part}." in name:
                return TensorPart(name.replace(part, whole), index)
        return TensorPart(name)

    return names | {path: fuse(part.name) for path, part in names.items() if part.place == 0}
