"""Beam search against itself done by hand, on a model of five tokens and on the engine."""

import math
import pathlib

import numpy as np
import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.beam_search import beam_params, beam_search
from jaxinfer.output_text import OutputText
from jaxinfer.outputs import CompletionOutput, Logprob, LogprobsRecord, RequestMetrics, RequestOutput
from jaxinfer.request import Request, output_of
from tests import tiny_model

END = 4


def next_logprobs(tokens: list[int]) -> dict[int, float]:
    """Of five tokens, after any others; peaked, and differently after every sequence."""
    logits = np.random.default_rng(tokens).normal(0, 2, 5)
    return dict(enumerate((logits - np.log(np.exp(logits).sum())).tolist()))


def generate(prompts: list[list[int]], params: SamplingParams) -> list[RequestOutput]:
    assert params.max_tokens == 1 and params.logprobs is not None
    outputs = []
    for prompt in prompts:
        top = sorted(next_logprobs(prompt).items(), key=lambda item: -item[1])[: params.logprobs]
        entry = {token: Logprob(value, rank, None) for rank, (token, value) in enumerate(top, start=1)}
        completion = CompletionOutput(0, "", [top[0][0]], "length", [entry], top[0][1])
        outputs.append(RequestOutput("", None, prompt, [completion], RequestMetrics()))
    return outputs


def search(beam_width: int, max_tokens: int, length_penalty: float) -> list[CompletionOutput]:
    requests = [
        Request(
            number=i,
            index=i,
            prompt=None,
            token_ids=[1, 2],
            params=beam_params(beam_width, max_tokens),
            stop_token_ids=(END,),
            max_tokens=max_tokens,
            seed=0,
            text=OutputText(None, ()),
            logprobs=LogprobsRecord(0, None),
        )
        for i in range(beam_width)
    ]
    beam_search(requests, generate, length_penalty)
    return output_of(requests).outputs


def every_output(max_tokens: int) -> list[tuple[list[int], float]]:
    """All that the model can write, with log-probabilities."""
    done, going = [], [([], 0.0)]
    for _ in range(max_tokens):
        grown = [([*o, t], p + lp) for o, p in going for t, lp in next_logprobs([1, 2, *o]).items()]
        done += [(o, p) for o, p in grown if o[-1] == END]
        going = [(o, p) for o, p in grown if o[-1] != END]
    return done + going


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
def test_a_beam_as_wide_as_the_tree_finds_the_best(length_penalty: float):
    """Two tokens deep, four beams are all that do not end."""
    best = sorted(every_output(2), key=lambda x: -x[1] / (2 + len(x[0]) - (x[0][-1] == END)) ** length_penalty)[:4]
    found = search(4, 2, length_penalty)
    assert [completion.token_ids for completion in found] == [output for output, _ in best]
    for completion, (output, logprob) in zip(found, best, strict=True):
        assert completion.cumulative_logprob is not None and math.isclose(completion.cumulative_logprob, logprob)
        assert completion.finish_reason == ("stop" if output[-1] == END else "length")
        assert len(completion.logprobs or []) == len(output)


def test_the_length_penalty_decides_between_long_and_short():
    assert len(search(3, 6, -3.0)[0].token_ids) < len(search(3, 6, 3.0)[0].token_ids)


def test_a_wider_beam_finds_what_a_narrow_one_misses():
    """Of outputs of the same length: the penalty leaves those that end early far behind."""
    best = [search(width, 6, 9.0)[0] for width in (1, 2, 4)]
    assert [len(completion.token_ids) for completion in best] == [6, 6, 6]
    scores = [completion.cumulative_logprob or 0 for completion in best]
    assert scores == sorted(scores) and scores[0] < scores[-1]


@pytest.mark.parametrize("beam_width", [0, 11, 1.5, True])
def test_beam_widths_out_of_range(beam_width: int):
    with pytest.raises(ValueError, match=rf"beam_width={beam_width}: must be an integer in \[1, 10\]"):
        beam_params(beam_width, 5)


@pytest.mark.parametrize("length_penalty", [float("nan"), 11, "1"])
def test_length_penalties_out_of_range(length_penalty: float):
    with pytest.raises(ValueError, match=r"length_penalty=.*: must be a number in \[-10, 10\]"):
        search(2, 3, length_penalty)


def test_the_engine_searches(tmp_path: pathlib.Path):
    """A beam of one is greedy; of several, each has the log-probability that scoring it as a prompt gives."""
    with Engine(str(tiny_model.make(tmp_path / "tiny")), **tiny_model.SIZES) as engine:
        greedy = engine.generate("abc", SamplingParams(temperature=0.0, max_tokens=8))[0].outputs[0]
        (one,) = engine.beam_search("abc", beam_width=1, max_tokens=8, length_penalty=0.0).outputs
        assert (one.token_ids, one.text, one.finish_reason) == (greedy.token_ids, greedy.text, "length")
        result = engine.beam_search("abc", beam_width=4, max_tokens=8)
        assert result.prompt == "abc" and len(result.outputs) == 4
        for beam in result.outputs:
            whole = result.prompt_token_ids + beam.token_ids
            score = engine.generate(whole, SamplingParams(max_tokens=1, prompt_logprobs=0))[0].prompt_logprobs or []
            own = [entry[t].logprob for t, entry in zip(whole, score, strict=True) if entry][-8:]
            assert math.isclose(beam.cumulative_logprob or 0, sum(own), rel_tol=1e-4)
        best = [beam.cumulative_logprob or 0 for beam in result.outputs]
        assert best == sorted(best, reverse=True) and best[0] >= (one.cumulative_logprob or 0)
        long = engine.beam_search([7] * 92, beam_width=2, max_tokens=50)
        assert [len(beam.token_ids) for beam in long.outputs] == [4, 4]  # all that max_model_len leaves
        assert not engine.has_unfinished_requests
