"""What Hugging Face computes for each encoder, in files under tests/golden/embeddings, and the comparison with it."""

import dataclasses
import pathlib
from typing import Any

import numpy as np

from tests.parity import golden, recipe
from tests.parity.encoder_driver import Encoding

DIRECTORY = golden.DIRECTORY.parent / "embeddings"

_FLOATS = ("hidden", "mean", "cls")


@dataclasses.dataclass(frozen=True)
class Text:
    """A prompt, and Hugging Face's vectors of it.

    Attributes:
      positions: where the last activations are known.
      hidden: float32 [len(positions), D], those.
      mean, cls: float32 [D].
    """

    prompt: list[int]
    positions: list[int]
    hidden: np.ndarray
    mean: np.ndarray
    cls: np.ndarray

    @classmethod
    def of(cls, prompt: list[int], hidden: np.ndarray, positions: list[int]) -> "Text":
        """From the activations [T, D] of all its tokens, of which those at `positions` are kept."""
        return cls(prompt, positions, hidden[positions], hidden.mean(axis=0), hidden[0])

    def error(self, ours: Encoding) -> float:
        """The largest relative error of what we make of the prompt."""
        pairs = ((ours.hidden[self.positions], self.hidden), (ours.mean, self.mean), (ours.cls, self.cls))
        return max(golden.relative_error(mine, theirs) for mine, theirs in pairs)


def save(family: str, name: str, texts: list[Text]) -> pathlib.Path:
    arrays: dict[str, Any] = {"fingerprint": _fingerprint(family, name)}
    for i, text in enumerate(texts):
        arrays |= {f"prompt_{i}": np.array(text.prompt, np.uint16), f"positions_{i}": np.array(text.positions)}
        arrays |= {f"{field}_{i}": getattr(text, field) for field in _FLOATS}
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    path = _path(family, name)
    np.savez_compressed(path, **arrays)
    return path


def load(family: str, name: str) -> list[Text]:
    """The golden texts of a case. Raises AssertionError where they were made for another model."""
    path, again = _path(family, name), "run python -m tests.parity.make_encoder_golden, which needs PyTorch"
    assert path.exists(), f"{path}: missing; {again}"
    with np.load(path, allow_pickle=False) as arrays:
        made_for = arrays["fingerprint"]
        assert made_for == _fingerprint(family, name), f"{path}: made for another config or other weights; {again}"
        return [
            Text(
                prompt=arrays[f"prompt_{i}"].tolist(),
                positions=arrays[f"positions_{i}"].tolist(),
                **{field: arrays[f"{field}_{i}"] for field in _FLOATS},
            )
            for i in range(len(recipe.PROMPT_LENGTHS))
        ]


def _path(family: str, name: str) -> pathlib.Path:
    return DIRECTORY / f"{family}__{name}.npz"


def _fingerprint(family: str, name: str) -> np.ndarray:
    return np.array(golden.fingerprint(family, recipe.tiny_config(family, name)), np.uint32)
