"""What an author adds to the generic tests: numbers against a reference. Run by tests/test_new_family.py."""

import pathlib

import numpy as np
import pytest

import sharding_rules
from tests.parity import driver, recipe
from tests.test_sharding_rules import describe_model

CONFIG = recipe.tiny_config("toy", "gqa")
NUM_HEADS, HEAD_DIM, GROUP_SIZE = 8, 8, 4  # of CONFIG


def reference_logits(tensors: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """[T, V], the whole model in float64 and without a cache."""
    w = {name: tensor.astype(np.float64) for name, tensor in tensors.items()}

    def norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + CONFIG["rms_norm_eps"]) * scale

    def heads(x: np.ndarray, matrix: np.ndarray) -> np.ndarray:  # [T, D] -> [N or K, T, H]
        return (x @ matrix.T).reshape(len(x), -1, HEAD_DIM).transpose(1, 0, 2)

    angles = np.outer(np.arange(len(tokens)), CONFIG["rope_theta"] ** (-np.arange(0, HEAD_DIM, 2) / HEAD_DIM))

    def rotated(x: np.ndarray) -> np.ndarray:
        pairs = (x[..., : HEAD_DIM // 2] + 1j * x[..., HEAD_DIM // 2 :]) * np.exp(1j * angles)
        return np.concatenate([pairs.real, pairs.imag], axis=-1)

    x, is_past = w["embed.weight"][tokens], np.tri(len(tokens), dtype=bool)
    for layer in range(CONFIG["num_hidden_layers"]):
        own = {name.split(f"blocks.{layer}.")[1]: t for name, t in w.items() if name.startswith(f"blocks.{layer}.")}
        normal = norm(x, own["norm.weight"])
        q, k, v = (heads(normal, own[f"attention.{name}.weight"]) for name in "qkv")
        q, k, v = rotated(q), np.repeat(rotated(k), GROUP_SIZE, axis=0), np.repeat(v, GROUP_SIZE, axis=0)
        scores = np.where(is_past, np.exp(q @ k.transpose(0, 2, 1) / np.sqrt(HEAD_DIM)), 0)
        attended = (scores / scores.sum(-1, keepdims=True)) @ v
        mlp = np.maximum(normal @ own["up.weight"].T, 0) @ own["down.weight"].T
        x = x + attended.transpose(1, 0, 2).reshape(len(tokens), -1) @ own["attention.out.weight"].T + mlp
    return norm(x, w["last_norm.weight"]) @ w["head.weight"].T


def test_logits_are_those_of_the_reference(tmp_path: pathlib.Path):
    tensors = recipe.weights("toy", CONFIG)
    prompts = [recipe.prompt(length, CONFIG["vocab_size"], seed) for seed, length in enumerate((5, 130))]
    found = driver.continue_prompts(recipe.write_model(tmp_path / "model", CONFIG, tensors), prompts, 8)
    for prompt, continuation in zip(prompts, found, strict=True):
        expected = reference_logits(tensors, prompt + continuation.tokens[:-1])
        assert np.abs(continuation.logits - expected).max() < 1e-5 * np.abs(expected).max()
        assert continuation.tokens == expected[len(prompt) - 1 :].argmax(-1).tolist()


@pytest.mark.parametrize("strategy", sharding_rules.strategies())
def test_sharded_by_the_names_of_its_axes(strategy: str):
    lines = describe_model("toy", strategy).splitlines()
    split = "(layers, mlp, embed)  (stage, ('context', 'tensor'), None)"  # under any strategy: there are no experts
    assert f"layers/0/up/weight  float32[2,96,64]  {split}  shard [1,24,64]" in lines
    assert len(lines) == 3 + (3 + 7) + 2  # a head of three; parameters, of a slot for layers; keys and values
