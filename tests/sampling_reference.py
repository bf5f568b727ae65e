"""Sampling by its definitions, in NumPy float64: one row, one token, no device arrays but the noise."""

import collections
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from jaxinfer.sampling_params import SamplingParams
from pallas_kernels.noise import gumbel


def process(
    logits: np.ndarray,
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    stop_token_ids: Sequence[int] = (),
    bad_words: Sequence[Sequence[int]] = (),
) -> np.ndarray:
    """Logits [V] for the token after `prompt` and `output`: bias, bans, minimum length, penalties."""
    out = logits.astype(np.float64)
    if params.allowed_token_ids is not None:
        banned = np.ones(len(out), bool)
        banned[list(params.allowed_token_ids)] = False
        out[banned] = -np.inf
    for token_id, bias in (params.logit_bias or {}).items():
        out[token_id] += bias
    for *beginning, last in bad_words:
        if len(output) >= len(beginning) and output[len(output) - len(beginning) :] == beginning:
            out[last] = -np.inf
    if len(output) < params.min_tokens:
        out[list(stop_token_ids)] = -np.inf
    for token_id in {*prompt, *output}:
        factor = params.repetition_penalty
        out[token_id] = out[token_id] / factor if out[token_id] > 0 else out[token_id] * factor
    for token_id, count in collections.Counter(output).items():
        out[token_id] -= params.frequency_penalty * count + params.presence_penalty
    return out


def keep_likely(logits: np.ndarray, params: SamplingParams) -> np.ndarray:
    """After temperature: min_p, then top_k, then top_p; the dropped become -inf."""
    scaled = logits / params.temperature
    probs = np.exp(scaled - scaled.max())
    scaled = np.where(probs >= params.min_p, scaled, -np.inf)
    order = np.argsort(-scaled, kind="stable")
    if params.top_k > 0:
        scaled[order[params.top_k :]] = -np.inf
    probs = np.exp(scaled - scaled.max())[order]
    probs /= probs.sum()
    before = np.cumsum(probs) - probs
    scaled[order[before >= params.top_p]] = -np.inf
    return scaled


def draw(logits: np.ndarray, params: SamplingParams, seed: int, position: int) -> int:
    """The token at `position` from processed logits [V], with the very noise that the devices use."""
    if params.temperature == 0:
        return int(np.argmax(logits))
    token_ids = jnp.arange(len(logits), dtype=jnp.uint32)
    noise = np.asarray(gumbel(jnp.uint32(seed), jnp.uint32(position), token_ids), np.float64)
    return int(np.argmax(keep_likely(logits, params) + noise))


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Over the last axis, in float64."""
    logits = logits.astype(np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
