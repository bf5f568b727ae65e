"""Writes tests/golden/parity with PyTorch: `python -m tests.parity.make_golden [family__config ...]`.

Prompts are drawn until none of the tokens that follow is a near-tie, so that they can be compared exactly.
"""

import os
import pathlib
import sys
import tempfile
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

from tests.parity import golden, recipe, reference

_MOST_ENTROPY = 0.9  # of uniform attention's, averaged over heads: beyond it content and position hardly matter
_MOST_SEEDS = 100


def make_sequence(model: Any, length: int, vocab_size: int) -> golden.Sequence:
    for seed in range(_MOST_SEEDS):
        prompt = recipe.prompt(length, vocab_size, seed)
        tokens = reference.greedy(model, prompt, recipe.NUM_TOKENS)
        if tokens is not None:
            fed = prompt + tokens[:-1]
            positions = golden.stored_positions(len(fed))
            return golden.Sequence(prompt, tokens, positions, reference.logits(model, fed)[positions])
    raise RuntimeError(
        f"{_MOST_SEEDS} prompts of {length} tokens, and a near-tie after each: the logits are degenerate"
    )


def make_case(family: str, name: str, directory: pathlib.Path) -> str:
    hf_config = recipe.tiny_config(family, name)
    model = reference.load(recipe.write_model(directory / family / name, hf_config, recipe.weights(family, hf_config)))
    sequences = [make_sequence(model, length, hf_config["vocab_size"]) for length in recipe.PROMPT_LENGTHS]
    entropy = reference.attention_entropy(model, sequences[-1].prompt)
    assert entropy.mean() < _MOST_ENTROPY, f"{family} {name}: attention is nearly uniform ({entropy.mean():.2f})"
    distinct = [len(set(sequence.tokens)) for sequence in sequences]
    path = golden.save(family, name, sequences)
    return (
        f"{path.name}: {path.stat().st_size} bytes, attention entropy {entropy.min():.2f} to {entropy.max():.2f} of "
        f"uniform, distinct tokens {distinct}"
    )


def main(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for family, name in recipe.CASES:
            if not wanted or f"{family}__{name}" in wanted:
                print(make_case(family, name, pathlib.Path(directory)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
