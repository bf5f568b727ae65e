"""Writes tests/golden/embeddings with PyTorch: `python -m tests.parity.make_encoder_golden [family__config ...]`."""

import os
import pathlib
import sys
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported

from tests.parity import encoder_golden, golden, recipe, reference

_MOST_ENTROPY = 0.9  # of uniform attention's, averaged over heads: beyond it content and position hardly matter


def make_case(family: str, name: str, directory: pathlib.Path) -> str:
    hf_config = recipe.tiny_config(family, name)
    model_dir = recipe.write_model(directory / family / name, hf_config, recipe.weights(family, hf_config))
    model = reference.load_encoder(model_dir)
    texts = []
    for length in recipe.PROMPT_LENGTHS:
        prompt = recipe.prompt(length, hf_config["vocab_size"], seed=0)
        hidden = reference.hidden(model, prompt)
        texts.append(encoder_golden.Text.of(prompt, hidden, golden.stored_positions(length)))
    entropy = reference.attention_entropy(model, texts[-1].prompt)
    assert entropy.mean() < _MOST_ENTROPY, f"{family} {name}: attention is nearly uniform ({entropy.mean():.2f})"
    path = encoder_golden.save(family, name, texts)
    size = path.stat().st_size
    return f"{path.name}: {size} bytes, attention entropy {entropy.min():.2f} to {entropy.max():.2f} of uniform"


def main(wanted: list[str]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        for family, name in recipe.ENCODER_CASES:
            if not wanted or f"{family}__{name}" in wanted:
                print(make_case(family, name, pathlib.Path(directory)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
