"""Prompts, and what an engine writes after one when nothing else runs."""

import numpy as np

from jaxinfer import Engine, SamplingParams

GREEDY = SamplingParams(temperature=0.0, max_tokens=20)


def prompts(count: int, longest: int = 150, seed: int = 0) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 256, rng.integers(1, longest)).tolist() for _ in range(count)]


def solo(engine: Engine, prompt: list[int], params: SamplingParams) -> list[int]:
    return engine.generate(prompt, params)[0].outputs[0].token_ids
