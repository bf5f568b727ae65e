"""Does the parity check bite? Planted faults, each of which must raise the error above what parity allows."""

import pathlib

import pytest

from tests.long_campaign import chosen
from tests.parity import driver, golden, recipe
from tests.parity.faults import FAULTS
from tests.parity.planting import Fault

# Of each kind the one that shows least, and those of the engine's own.
TELLING = {
    "rope positions in bfloat16",
    "norm epsilon times 100",
    "query heads strided over KV heads",
    "weights in bfloat16",
    "softmax in bfloat16",
    "decode one position late",
    "later chunks one position late",
    "block table names a page twice",
    "window one token too wide",
    "one expert too few",
    "sinks dropped",
    "latents not normalised",
}


def error(mine: driver.Continuation, theirs: golden.Sequence, decodes: bool) -> float:
    if decodes:
        return golden.error_on_same_input(mine.tokens, mine.logits, theirs)
    return golden.relative_error(mine.logits[theirs.positions], theirs.logits)


@pytest.mark.parametrize("fault", chosen(FAULTS, *(fault for fault in FAULTS if fault.name in TELLING)), ids=str)
def test_fault_is_detected(fault: Fault, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """Where nothing is wrong with decoding, the tokens that follow are given as well: that is quicker."""
    hf_config = recipe.tiny_config(fault.family, fault.config)
    model_dir = recipe.write_model(tmp_path / "model", hf_config, recipe.weights(fault.family, hf_config))
    sequences = golden.load(fault.family, fault.config)
    fault.plant(monkeypatch)
    prompts = [s.prompt + ([] if fault.decodes else s.tokens[:-1]) for s in sequences]
    num_tokens = recipe.NUM_TOKENS if fault.decodes else 1
    with driver.greedy_only():  # no fault is in sampling
        ours = driver.continue_prompts(model_dir, prompts, num_tokens, chunk=128, num_steps=0)
    short, long = (error(mine, theirs, fault.decodes) for mine, theirs in zip(ours, sequences, strict=True))
    print(f"{fault.name:36} relative error with 4 tokens {short:.1e}, with 600 tokens {long:.1e}")
    assert long > golden.MAX_ERROR
    assert (short > golden.MAX_ERROR) == (not fault.needs_long_prompt)
