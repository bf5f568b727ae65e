"""Runs an encoder on prompts of unlike length side by side, for a view of its last activations at every position."""

import dataclasses
import pathlib

import jax
import numpy as np

from jaxinfer import encoder_batch
from jaxinfer.embedder import pool
from jaxinfer.encoder_batch import EncoderBatch, EncoderShape
from tests.parity import driver

PADDED_LENGTH = 640  # of every prompt, so that the shortest has much behind it


@dataclasses.dataclass(frozen=True)
class Encoding:
    """What an encoder makes of one prompt of T tokens.

    Attributes:
      hidden: float32 [T, D], the last activations.
      mean, cls: float32 [D].
    """

    hidden: np.ndarray
    mean: np.ndarray
    cls: np.ndarray


def encode(model_dir: pathlib.Path, prompts: list[list[int]]) -> list[Encoding]:
    """All prompts in one batch, on one device."""
    definition, weights = driver.load(model_dir)

    def run(weights, batch: EncoderBatch):
        hidden = definition.bind_encoder(weights)(batch.tokens, batch.lengths)
        return hidden, *pool(hidden, batch.lengths)

    batch = encoder_batch.build(EncoderShape(len(prompts), PADDED_LENGTH), prompts)
    by_prompt = zip(prompts, *map(np.asarray, jax.jit(run)(weights, batch)), strict=True)
    return [Encoding(hidden[: len(prompt)], mean, cls) for prompt, hidden, mean, cls in by_prompt]
