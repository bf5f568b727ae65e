"""BERT's files as they are published: keys of config.json, and tensors that have no parameter."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxinfer.config import EncoderConfig
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import bert
from tests.parity import driver, recipe

TINY = bert.TINY_CONFIGS["mha"]


def parse(**changes: Any) -> EncoderConfig:
    return bert.parse_config(HFConfig(TINY | changes, "m/config.json"))


def test_numbers():
    config = parse(layer_norm_eps=1e-5, hidden_act="gelu_new")
    assert (config.head_dim, config.num_token_types, config.norm_eps) == (8, 2, 1e-5)
    assert config.activation == "gelu_pytorch_tanh"  # the same function


def test_keys_without_influence_are_accepted():
    pooler = {"pooler_fc_size": 768, "pooler_type": "first_token_transform", "pooler_num_fc_layers": 3}
    others = {"classifier_dropout": 0.1, "hidden_dropout_prob": 0.0, "gradient_checkpointing": False, "use_cache": True}
    assert parse(**pooler, **others, directionality="bidi", add_cross_attention=False, id2label={"0": "a"}) == parse()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"position_embedding_type": "relative_key"}, "position_embedding_type='relative_key' is not implemented"),
        ({"is_decoder": True}, "is_decoder=True is not implemented; implemented: False"),
        ({"add_cross_attention": True}, "add_cross_attention=True is not implemented"),
        ({"directionality": "uni"}, "directionality='uni' is not implemented"),
        ({"hidden_act": "relu"}, "hidden_act='relu' is not implemented; implemented: 'gelu', 'gelu_new', 'gelu_py"),
        ({"model_type": "roberta"}, "model_type='roberta' is not implemented"),
        ({"num_attention_heads": 7}, "m/config.json: hidden_size 64 is not a multiple of num_attention_heads 7"),
        ({"rope_theta": 1e4}, "unknown keys ['rope_theta'] may change the mathematics"),
        ({"auto_map": {"AutoModel": "m.Model"}}, "puts the model's mathematics into the directory's own code"),
    ],
)
def test_what_is_not_computed_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse(**changes)


def test_tensors_that_are_not_used_may_be_there(tmp_path: pathlib.Path):
    """As in most published files; one that nobody knows is refused."""
    tensors, dim = recipe.weights("bert", TINY), TINY["hidden_size"]
    plain, full = (recipe.write_model(tmp_path / name, TINY, tensors) for name in ("plain", "full"))
    unused = {"pooler.dense.weight": np.ones((dim, dim), np.float32), "pooler.dense.bias": np.ones(dim, np.float32)}
    unused |= {"embeddings.position_ids": np.arange(1024)[None]}
    save_file(tensors | unused, full / "model.safetensors")
    for array, again in zip(driver.load(plain)[1], driver.load(full)[1], strict=True):
        np.testing.assert_array_equal(again, array)
    save_file(tensors | {"pooler.dense.scale": np.ones(dim, np.float32)}, full / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing 0 \(\); left over 1 \(pooler.dense.scale\)"):
        driver.load(full)


def test_old_names_are_refused(tmp_path: pathlib.Path):
    """Of the first BERT files, whose norms were called otherwise."""
    tensors = recipe.weights("bert", TINY)
    old = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in tensors.items()}
    with pytest.raises(ValueError, match=r"missing 5 .*left over 5 .*LayerNorm.gamma"):
        driver.load(recipe.write_model(tmp_path / "model", TINY, old))
