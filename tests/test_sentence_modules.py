"""sentence-transformers' modules.json: what a text goes through, of which `Engine.embed` does the first three."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from jaxinfer import Engine
from jaxinfer.models import bert
from jaxinfer.sentence_modules import check_modules
from tests.parity import recipe


def modules(*names: str) -> str:
    return json.dumps([{"idx": i, "type": f"sentence_transformers.models.{name}"} for i, name in enumerate(names)])


def test_modules_that_are_asked_for_or_done_anyway_are_fine(tmp_path: pathlib.Path):
    (tmp_path / "modules.json").write_text(modules("Transformer", "Pooling", "Normalize"))
    check_modules(tmp_path)


def encoder(directory: pathlib.Path, **files: Any) -> pathlib.Path:
    """A tiny one with sentence-transformers' files."""
    config = bert.TINY_CONFIGS["mha"]
    model_dir = recipe.write_model(directory / "model", config, recipe.weights("bert", config))
    (model_dir / "1_Pooling").mkdir()
    for name, values in files.items():
        path = {"pooling": "1_Pooling/config.json", "text": "sentence_bert_config.json"}[name]
        (model_dir / path).write_text(json.dumps(values))
    return model_dir


@pytest.mark.parametrize(
    ("files", "pooling"),
    [
        ({}, "mean"),
        ({"pooling": {"pooling_mode_cls_token": False, "pooling_mode_mean_tokens": True}}, "mean"),
        ({"pooling": {"word_embedding_dimension": 64, "pooling_mode_cls_token": True}}, "cls"),
        ({"text": {"max_seq_length": 512, "do_lower_case": False}}, "mean"),
    ],
)
def test_the_pooling_of_the_directory_is_the_default(files: dict[str, Any], pooling: str, tmp_path: pathlib.Path):
    with Engine(str(encoder(tmp_path, **files)), max_num_seqs=1, max_model_len=16) as engine:
        np.testing.assert_array_equal(engine.embed([[1, 2, 3]]), engine.embed([[1, 2, 3]], pooling=pooling))
        other = {"mean": "cls", "cls": "mean"}[pooling]
        assert np.abs(engine.embed([[1, 2, 3]]) - engine.embed([[1, 2, 3]], pooling=other)).max() > 1e-3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"pooling": {"pooling_mode_max_tokens": True}},
            r"config.json: \['pooling_mode_max_tokens'\] is not",
        ),
        (
            {"pooling": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}},
            "is not implemented; implemented: one of pooling_mode_mean_tokens, pooling_mode_cls_token",
        ),
        ({"pooling": [1]}, r"1_Pooling/config.json: expected a JSON object, found list"),
        ({"text": {"do_lower_case": True}}, r"sentence_bert_config.json: do_lower_case is not implemented"),
    ],
)
def test_what_embed_would_leave_out_is_refused(files: dict[str, Any], message: str, tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=message):
        Engine(str(encoder(tmp_path, **files)))


def test_a_pooling_outside_of_the_directory_is_not_read(tmp_path: pathlib.Path):
    model_dir = encoder(tmp_path)
    (tmp_path / "config.json").write_text('{"pooling_mode_cls_token": true}')
    (model_dir / "1_Pooling" / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(ValueError, match="is a link that leads out of the directory"):
        Engine(str(model_dir))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            modules("Transformer", "Pooling", "Dense"),
            "modules.json: Dense is not implemented; implemented: Transformer, ",
        ),
        ("{", "modules.json: not a readable list of modules: JSONDecodeError"),
        ('[{"path": ""}]', "modules.json: not a readable list of modules: KeyError"),
    ],
)
def test_vectors_that_more_is_done_to_are_refused(text: str, message: str, tmp_path: pathlib.Path):
    config = bert.TINY_CONFIGS["mha"]
    model_dir = recipe.write_model(tmp_path / "model", config, recipe.weights("bert", config))
    (model_dir / "modules.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        Engine(str(model_dir))
