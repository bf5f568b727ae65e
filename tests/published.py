"""config.json as the authors of models published it, by name, from tests/published_configs."""

import json
import pathlib
from typing import Any

from jaxinfer import models
from jaxinfer.config import ModelConfig
from jaxinfer.hf_config import HFConfig

DIRECTORY = pathlib.Path(__file__).parent / "published_configs"


def names() -> list[str]:
    return sorted(path.stem for path in DIRECTORY.glob("*.json"))


def values(name: str) -> dict[str, Any]:
    return json.loads((DIRECTORY / f"{name}.json").read_text(encoding="utf-8"))


def read(name: str) -> ModelConfig:
    """By the family that its architecture names."""
    hf = HFConfig(values(name), name)
    return models.for_architecture(hf.architecture).parse_config(hf)
