"""Beam search: the likeliest outputs rather than drawn ones, one token of every beam at a time. Host only.

Each round is a request per beam for one token and its likeliest alternatives; what beams share is in the prefix
cache. Beams are ranked as in vLLM: by the sum of log-probabilities over length ** length_penalty, where the length
counts prompt and output but not the end token.
"""

import dataclasses
from collections.abc import Callable, Sequence

from jaxinfer.outputs import Logprob, RequestOutput, TokenLogprobs
from jaxinfer.request import Request
from jaxinfer.sampling_params import MAX_LOGPROBS, SamplingParams, check_number

MAX_BEAM_WIDTH = MAX_LOGPROBS // 2

Generate = Callable[[list[list[int]], SamplingParams], list[RequestOutput]]


@dataclasses.dataclass(frozen=True)
class Beam:
    """A sequence that is being searched: the output so far, after a prompt that all have in common."""

    token_ids: tuple[int, ...] = ()
    logprobs: tuple[Logprob, ...] = ()
    is_ended: bool = False

    def score(self, num_prompt_tokens: int, length_penalty: float) -> float:
        length = num_prompt_tokens + len(self.token_ids) - self.is_ended
        return sum(entry.logprob for entry in self.logprobs) / length**length_penalty


def beam_params(beam_width: int, max_tokens: int) -> SamplingParams:
    """Of the requests that `beam_search` fills, one per beam. Raises ValueError for what is out of range."""
    if type(beam_width) is not int or not 1 <= beam_width <= MAX_BEAM_WIDTH:
        raise ValueError(f"beam_width={beam_width!r}: must be an integer in [1, {MAX_BEAM_WIDTH}]")
    return SamplingParams(n=beam_width, max_tokens=max_tokens, logprobs=0)


def beam_search(requests: list[Request], generate: Generate, length_penalty: float) -> None:
    """Gives the requests, which are of one prompt and never run, the best outputs, best first.

    Raises ValueError for a `length_penalty` out of range.
    """
    check_number("length_penalty", length_penalty, -10, 10)
    prompt, max_tokens = requests[0].prompt_token_ids, requests[0].max_tokens
    stop_token_ids = requests[0].stop_token_ids

    def best(beams: list[Beam]) -> list[Beam]:
        return sorted(beams, key=lambda beam: -beam.score(len(prompt), length_penalty))[: len(requests)]

    ended, beams = [], [Beam()]
    for _ in range(max_tokens):
        sequences = [prompt + [*beam.token_ids] for beam in beams]
        candidates = [
            Beam((*beam.token_ids, token_id), (*beam.logprobs, entry), token_id in stop_token_ids)
            for beam, entries in zip(beams, _next_tokens(sequences, generate, 2 * len(requests)), strict=True)
            for token_id, entry in entries.items()
        ]
        ended += [beam for beam in candidates if beam.is_ended]
        beams = best([beam for beam in candidates if not beam.is_ended])
        if not beams:
            break
    for request, beam in zip(requests, best(ended + beams), strict=True):
        for token_id, entry in zip(beam.token_ids, beam.logprobs, strict=True):
            request.append([token_id], TokenLogprobs(entry.logprob, entry.rank, (), ()))


def _next_tokens(sequences: list[list[int]], generate: Generate, count: int) -> Sequence[dict[int, Logprob]]:
    """The likeliest ones after each sequence, by id."""
    outputs = generate(sequences, SamplingParams(temperature=0.0, max_tokens=1, logprobs=count))
    found = [logprobs[0] for output in outputs if (logprobs := output.outputs[0].logprobs)]
    if len(found) < len(outputs):
        raise RuntimeError("beam search: the model produced values that are not finite")
    return found
