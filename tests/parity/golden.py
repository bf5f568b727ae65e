"""What Hugging Face computes for each case, in files under tests/golden/parity, and the comparison with it."""

import dataclasses
import json
import pathlib
import zlib
from typing import Any

import numpy as np

from tests.parity import recipe

DIRECTORY = pathlib.Path(__file__).parents[1] / "golden" / "parity"
MAX_ERROR = 1e-4  # of the largest logit; float32 on both sides, summed in another order

# Of prompt and output together: around the ends of pages and chunks, and the first and last of the output.
_STORED = (0, 1, 2, 3, 4, 15, 16, 17, 40, 66, 255, 256, 257, 511, 512, 598, 599, 600, 607, 608, 640, 662)

_INTEGERS = ("prompt", "tokens", "positions")


@dataclasses.dataclass(frozen=True)
class Sequence:
    """A prompt, what follows it, and Hugging Face's logits.

    Attributes:
      prompt, tokens: the latter greedy.
      positions: where logits are known, among prompt and tokens.
      logits: float32 [len(positions), V].
    """

    prompt: list[int]
    tokens: list[int]
    positions: list[int]
    logits: np.ndarray


def stored_positions(length: int) -> list[int]:
    return [p for p in _STORED if p < length]


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference over the largest logit; infinite where ours is not finite."""
    error = np.max(np.abs(ours - theirs)) / np.max(np.abs(theirs))
    return float(error) if np.isfinite(error) else float("inf")


def error_on_same_input(tokens: list[int], logits: np.ndarray, theirs: Sequence) -> float:
    """Relative error at the stored positions, as far as both have seen the same tokens."""
    same = next((i for i, (a, b) in enumerate(zip(tokens, theirs.tokens, strict=True)) if a != b), len(tokens))
    count = sum(position < len(theirs.prompt) + same for position in theirs.positions)
    return relative_error(logits[theirs.positions[:count]], theirs.logits[:count])


def save(family: str, name: str, sequences: list[Sequence]) -> pathlib.Path:
    hf_config = recipe.tiny_config(family, name)
    arrays: dict[str, Any] = {"fingerprint": np.array(fingerprint(family, hf_config), np.uint32)}
    for i, sequence in enumerate(sequences):
        for field in _INTEGERS:
            arrays[f"{field}_{i}"] = np.array(getattr(sequence, field), np.uint16)
        arrays[f"logits_{i}"] = sequence.logits
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    path = _path(family, name)
    np.savez_compressed(path, **arrays)
    return path


def load(family: str, name: str) -> list[Sequence]:
    """The golden sequences of a case. Raises AssertionError where they were made for another model."""
    path, again = _path(family, name), "run python -m tests.parity.make_golden, which needs PyTorch"
    assert path.exists(), f"{path}: missing; {again}"
    with np.load(path, allow_pickle=False) as arrays:
        expected = fingerprint(family, recipe.tiny_config(family, name))
        assert int(arrays["fingerprint"]) == expected, f"{path}: made for another config or other weights; {again}"
        return [
            Sequence(**{field: arrays[f"{field}_{i}"].tolist() for field in _INTEGERS}, logits=arrays[f"logits_{i}"])
            for i in range(len(recipe.PROMPT_LENGTHS))
        ]


def _path(family: str, name: str) -> pathlib.Path:
    return DIRECTORY / f"{family}__{name}.npz"


def fingerprint(family: str, hf_config: dict[str, Any]) -> int:
    """Of config.json and the weights."""
    crc = zlib.crc32(json.dumps(hf_config, sort_keys=True).encode())
    for name, tensor in sorted(recipe.weights(family, hf_config).items()):
        crc = zlib.crc32(tensor.tobytes(), zlib.crc32(name.encode(), crc))
    return crc
