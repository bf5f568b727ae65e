"""config.json is read by an allow-list: each refusal names the file, the key and the values that would do."""

import math
import pathlib
import re
from typing import Any

import pytest

from jaxinfer import models
from jaxinfer.config import ModelConfig, RopeConfig, yarn_mscale
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama

BASE: dict[str, Any] = dict(llama.TINY_CONFIGS["gqa"])
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
NO_THETA = {"rope_theta": None}


def parse(**changes: Any) -> ModelConfig:
    return llama.parse_config(HFConfig(BASE | changes, "m/config.json"))


@pytest.mark.parametrize("family", models.families())
def test_tiny_configs_are_of_their_family(family: str):
    module = models.get(family)
    assert len(module.TINY_CONFIGS) >= 1
    for values in module.TINY_CONFIGS.values():
        assert module.parse_config(HFConfig(values)).family == family
        assert models.for_architecture(HFConfig(values).architecture) is module


def test_defaults_of_absent_keys():
    config = llama.parse_config(HFConfig(llama.TINY_CONFIGS["llama2"]))
    assert (config.num_kv_heads, config.head_dim, config.tie_embeddings) == (8, 8, False)
    assert config.rope == RopeConfig(10000.0)


def test_llama2_as_it_was_published():
    """Its config.json has no rope_theta, and a rope_scaling that is null; so have those of its longer finetunes."""
    assert parse(rope_theta=None, rope_scaling=None).rope == RopeConfig(10000.0)
    linear = parse(rope_theta=None, rope_scaling={"type": "linear", "factor": 4.0})
    assert linear.rope == RopeConfig(10000.0, "linear", 4.0)


def test_theta_without_a_familys_default_is_required():
    with pytest.raises(ValueError, match="neither rope_theta nor rope_parameters is given; there is no safe default"):
        HFConfig(BASE | NO_THETA).rope()
    assert HFConfig(BASE).rope(default_theta=5e5).theta == 10000.0


def test_null_counts_as_absent():
    assert parse(head_dim=None, num_key_value_heads=None, some_future_key=None).head_dim == 8


def test_keys_without_influence_are_accepted():
    assert parse(torch_dtype="bfloat16", bos_token_id=1, use_cache=True, pretraining_tp=1) == parse()
    assert parse(auto_map={"AutoTokenizer": "tokenizer.Mine"}, bad_words_ids=[[1]]) == parse()
    assert parse(rope_scaling={"type": "linear", "rope_type": "linear", "factor": 2}) == parse(
        rope_scaling={"type": "linear", "factor": 2.0}
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sliding_window": 64}, "m/config.json: unknown keys ['sliding_window'] may change the mathematics"),
        ({"hidden_size": "64"}, "m/config.json: hidden_size is '64'; expected int"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0; expected int"),
        ({"vocab_size": True}, "vocab_size is True; expected int"),
        ({"vocab_size": None}, "m/config.json: vocab_size is missing"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings is 1; expected bool"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented; implemented: 'silu'"),
        ({"num_hidden_layers": 0}, "m/config.json: num_hidden_layers is 0; expected a positive number"),
        ({"num_attention_heads": -8}, "num_attention_heads is -8; expected a positive number"),
        ({"rms_norm_eps": 0.0}, "m/config.json: rms_norm_eps is 0.0; expected a positive number"),
        ({"rms_norm_eps": -1e-5}, "rms_norm_eps is -1e-05; expected a positive number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan; expected a positive number"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps is inf; expected a positive number"),
        ({"rms_norm_eps": 10**400}, "; expected float"),
        ({"rope_theta": 10**400}, "; expected a positive number"),
        ({"model_type": "mistral"}, "m/config.json: model_type='mistral' is not implemented; implemented: 'llama'"),
        (
            {"auto_map": {"AutoConfig": "c.C", "AutoModelForCausalLM": "m.Model"}},
            "m/config.json: auto_map={'AutoModelForCausalLM': 'm.Model'} puts the model's mathematics into",
        ),
        ({"auto_map": "m.Model"}, "auto_map is 'm.Model'; expected an object"),
        (
            {"rope_scaling": {"type": "linear", "rope_type": "llama3", "factor": 2.0}},
            "m/config.json: rope_type is 'llama3' and type is 'linear'; they mean the same",
        ),
        ({"num_key_value_heads": 3}, "num_attention_heads 8 is not a multiple of num_key_value_heads 3"),
        ({"head_dim": 15}, "15 of head_dim rotate; an odd number has no pairs"),
        ({"rope_theta": -1.0}, "rope_theta is -1.0; expected a positive number"),
        ({"rope_scaling": "linear"}, "rope_scaling is 'linear'; expected an object"),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_type 'dynamic' is not implemented; implemented: default, linear, llama3, yarn",
        ),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "'yarn' needs ['original_max_position_embeddings']"),
        ({"rope_scaling": YARN | {"mscale": 1.0}}, "rope_type 'yarn' needs ['mscale_all_dim']"),
        ({"rope_scaling": YARN | {"truncate": 1}}, "truncate is 1; expected bool"),
        ({"rope_scaling": YARN | {"beta_fast": 0}}, "beta_fast is 0; expected a positive number"),
        ({"rope_scaling": YARN | {"beta": 1}}, "rope_type 'yarn' does not know ['beta']"),
        ({"rope_scaling": {"type": "linear"}}, "rope_type 'linear' needs ['factor']"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "beta": 1}}, "rope_type 'linear' does not know ['beta']"),
        ({"rope_scaling": {"type": "linear", "factor": True}}, "factor is True; expected a positive number"),
        (
            {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
            "'llama3' needs ['low_freq_factor', 'high_freq_factor', 'orig",
        ),
        (NO_THETA | {"rope_parameters": {"rope_type": "default"}}, "rope_type 'default' needs ['rope_theta']"),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "rope_theta is 10000.0 here and 500000.0 in rope_parameters",
        ),
        (
            {"rope_scaling": {"factor": 2.0}, "rope_parameters": {"rope_type": "linear", "factor": 4.0}},
            "factor is 2.0 here and 4.0 in rope_parameters",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(**changes)


def test_both_shapes_of_rope_agree():
    old = parse(rope_scaling=LLAMA3)
    assert old == parse(**NO_THETA, rope_parameters=LLAMA3 | {"rope_theta": 10000.0})
    assert old == parse(rope_parameters=LLAMA3)  # some writers leave rope_theta outside
    assert old == parse(rope_scaling=LLAMA3, rope_parameters=LLAMA3)
    assert old.rope == RopeConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 64)


def test_factor_of_yarn_on_cos_and_sin():
    """DeepSeek has a part of it on all scores instead; `attention_factor` comes before both."""

    def of_file(**keys: float | None) -> float:
        rope = parse(rope_scaling=YARN | keys).rope
        assert rope is not None
        return rope.attention_factor

    assert of_file() == 0.1 * math.log(4) + 1
    assert of_file(mscale=1.0, mscale_all_dim=1.0) == 1
    assert of_file(mscale=2.0, mscale_all_dim=0.5) == (0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1)
    assert of_file(mscale=2.0, mscale_all_dim=0.5, attention_factor=1.5) == 1.5
    assert of_file(factor=0.5) == 1
    assert of_file(attention_factor=None, beta_fast=None, mscale=None) == of_file()
    rope = parse(rope_scaling=YARN | {"mscale": 1.0, "mscale_all_dim": 0.707}).rope
    assert rope is not None and yarn_mscale(rope.factor, rope.mscale_all_dim) == 0.0707 * math.log(4) + 1


def test_unknown_architecture_lists_the_known():
    with pytest.raises(
        ValueError, match=r"architecture 'MambaForCausalLM' is not supported; known: .*LlamaForCausalLM"
    ):
        models.for_architecture(HFConfig(BASE | {"architectures": ["MambaForCausalLM"]}).architecture)


@pytest.mark.parametrize("architectures", [None, [], "LlamaForCausalLM", ["A", "B"], [1]])
def test_architectures_must_be_one_name(architectures: Any):
    with pytest.raises(ValueError, match=r"architectures must be a list of one name, found"):
        _ = HFConfig(BASE | {"architectures": architectures}).architecture


def test_unreadable_files(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"no config.json there; --model takes a Hugging Face model directory"):
        HFConfig.read(tmp_path)
    (tmp_path / "config.json").symlink_to(tmp_path / "nothing.json")
    with pytest.raises(ValueError, match=r"no config.json there"):
        HFConfig.read(tmp_path)
    (tmp_path / "config.json").unlink()
    for text, message in (
        ("{", "not readable JSON"),
        ("[" * 100_000, "not readable JSON"),
        ("[]", "expected a JSON object, found list"),
    ):
        (tmp_path / "config.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=message):
            HFConfig.read(tmp_path)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("gemma2", {"cache_implementation": "hybrid", "sliding_window_size": 100, "hidden_act": "gelu_pytorch_tanh"}),
        ("gemma3", {"cache_implementation": "hybrid"}),
        ("qwen2", {"use_mrope": False}),
        ("llama", {"is_encoder_decoder": False}),
    ],
)
def test_keys_of_published_files_that_change_nothing(family: str, keys: dict[str, Any]):
    module, values = models.get(family), models.get(family).TINY_CONFIGS["gqa"]
    assert module.parse_config(HFConfig(values | keys)) == module.parse_config(HFConfig(values))
    for key in keys.keys() - {"cache_implementation"}:
        with pytest.raises(ValueError, match=f"{key}="):
            module.parse_config(HFConfig(values | {key: 7}))
