"""sentence-transformers' modules.json: what a text goes through, of which `Engine.embed` does the first three."""

import json
import pathlib

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
