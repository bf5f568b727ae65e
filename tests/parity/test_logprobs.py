"""Log-probabilities that the engine reports against log-softmax of the logits that transformers computes."""

import pathlib

import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.outputs import Logprob
from tests.parity import recipe, reference

CONFIG = recipe.tiny_config("llama", "gqa")


@pytest.mark.parity
def test_logprobs_are_those_of_transformers(tmp_path: pathlib.Path):
    """Of prompts cut into chunks and of what is generated, drawn with penalties: they do not move the raw logits."""
    model_dir = recipe.write_model(tmp_path / "model", CONFIG, recipe.weights("llama", CONFIG))
    peer = reference.load(model_dir)
    prompts = [recipe.prompt(length, CONFIG["vocab_size"], seed=length) for length in (1, 7, 40, 100)]
    params = SamplingParams(seed=1, max_tokens=20, presence_penalty=1.0, logprobs=5, prompt_logprobs=5)
    with Engine(str(model_dir), max_num_seqs=3, max_num_batched_tokens=32, max_model_len=128) as engine:
        outputs = engine.generate(prompts, params)
    worst = 0.0
    for output in outputs:
        entries = [*(output.prompt_logprobs or [])[1:], *(output.outputs[0].logprobs or [])]
        tokens = output.prompt_token_ids + output.outputs[0].token_ids
        logits = reference.logits(peer, tokens)[:-1].astype(np.float64)
        logprobs = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
        logprobs -= logits.max(-1, keepdims=True)
        assert len(entries) == len(tokens) - 1
        for token_id, entry, wanted in zip(tokens[1:], entries, logprobs, strict=True):
            worst = max(worst, check_entry(entry, token_id, wanted))
    print(f"worst relative error {worst:.1e}")
    assert worst < 1e-4


def check_entry(entry: dict[int, Logprob] | None, token_id: int, wanted: np.ndarray) -> float:
    """The largest relative error; the tokens must be the right ones."""
    assert entry is not None and set(entry) == {token_id, *np.argsort(-wanted)[:5].tolist()}
    return max(abs(found.logprob / wanted[found_id] - 1) for found_id, found in entry.items())
