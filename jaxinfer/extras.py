"""What a step is given beyond its StepBatch if one of its requests asks for more than a plain draw.

Such a request's parameters and tokens live in its slot on the devices, `SlotParams`: written when its prefill ends,
the host's knowledge of the output included, and extended there by each token that is drawn, for the host is a step
late. So a step itself has little to carry.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxinfer.batch import Array, Buckets, StepShape
from jaxinfer.logits_processors import ProcessorArrays
from jaxinfer.request import MAX_BAD_WORD_TOKENS, MAX_BAD_WORDS, MAX_STOP_TOKEN_IDS, Request
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.step_plan import StepPlan


class SlotParams(NamedTuple):
    """What the full sampler needs of a request; on the devices with [D, slots] for the [D] here."""

    history: Array  # int32 [D, L]; the token at each position
    bias: Array  # float32 [D, V]; -inf for a token that is not allowed
    processors: ProcessorArrays  # of D rows


class SlotLoad(NamedTuple):
    """Parameters to write into a slot of each shard."""

    slots: Array  # int32 [D]; -1: nothing to write
    params: SlotParams


class FullRows(NamedTuple):
    """Which rows of a step the full sampler does more for than to draw."""

    is_full: Array  # bool [D, R]
    wants_logprobs: Array  # bool []; whether any row does
    draws: Array  # bool []; whether any row's temperature is above 0


class Score(NamedTuple):
    """The tokens of prompts whose log-probabilities are wanted."""

    targets: Array  # int32 [D, T]; the token after each of the chunks
    length: Array  # int32 []; most tokens of a shard's chunks


class Extras(NamedTuple):
    """Each part, or nothing if the step does not need it."""

    loads: tuple[SlotLoad, ...]
    rows: FullRows | None
    score: Score | None


class ExtrasSpec(NamedTuple):
    """Sizes of the arrays; counts are of one data shard."""

    num_slots: int
    max_len: int  # tokens of the longest sequence
    vocab_size: int
    max_chunk: int  # most tokens of a shard's chunks

    @classmethod
    def create(cls, buckets: Buckets, vocab_size: int) -> "ExtrasSpec":
        max_len = buckets.pages[-1] * buckets.page_size
        return cls(buckets.rows[-1], max_len, vocab_size, buckets.chunk_tokens[-1])

    @property
    def slots_bytes(self) -> int:
        """Of all `SlotParams` of a shard."""
        arrays = jax.tree.leaves(slot_load([None], self).params)
        return self.num_slots * sum(array.nbytes for array in arrays)


def build(plan: StepPlan, shape: StepShape, spec: ExtrasSpec) -> Extras | None:
    """None if the plain sampler does and nobody asks about a prompt."""
    if not plan.has_extras:
        return None
    rows = _full_rows(plan, shape)
    is_new = lambda chunk: chunk.is_last and chunk.request.needs_full_sampler  # noqa: E731
    new = [[chunk.request for chunk in filter(is_new, chunks)] for chunks in plan.chunks]
    loads = tuple(slot_load(requests, spec) for requests in itertools.zip_longest(*new))
    asked = any(chunk.request.wants_prompt_logprobs for chunks in plan.chunks for chunk in chunks)
    score = _score(plan, spec) if asked else None
    return Extras(loads, rows, score) if rows or score else None


def slot_load(requests: Sequence[Request | None], spec: ExtrasSpec) -> SlotLoad:
    """For a request per shard whose prefill ends, so that all its tokens are known; None: nothing to write."""
    history = np.zeros((len(requests), spec.max_len), np.int32)
    bias = np.zeros((len(requests), spec.vocab_size), np.float32)
    for shard, request in enumerate(requests):
        if request is not None:
            history[shard, : len(request.token_ids)] = request.token_ids
            _add_bias(bias[shard], request.params)
    processors = jax.tree.map(lambda *rows: np.stack(rows), *map(_processors, requests))
    slots = np.array([-1 if request is None else request.slot for request in requests], np.int32)
    return SlotLoad(slots, SlotParams(history, bias, processors))


def _full_rows(plan: StepPlan, shape: StepShape) -> FullRows | None:
    is_full = np.zeros((len(plan.rows), shape.rows + shape.chunks), bool)
    wants_logprobs = draws = False
    for shard, (requests, chunks) in enumerate(zip(plan.rows, plan.chunks, strict=True)):
        of_chunks = [(i, chunk.request) for i, chunk in enumerate(chunks, shape.rows) if chunk.is_last]
        for row, request in [*enumerate(requests), *of_chunks]:
            is_full[shard, row] = request.needs_full_sampler
            wants_logprobs |= request.params.logprobs is not None
            draws |= request.params.temperature > 0
    return FullRows(is_full, np.array(wants_logprobs), np.array(draws)) if is_full.any() else None


def _score(plan: StepPlan, spec: ExtrasSpec) -> Score:
    targets = np.zeros((len(plan.chunks), spec.max_chunk), np.int32)
    ends = [0 for _ in plan.chunks]
    for shard, chunks in enumerate(plan.chunks):
        for chunk in chunks:
            following = chunk.request.token_ids[chunk.start + 1 : chunk.stop + 1]
            targets[shard, ends[shard] : ends[shard] + len(following)] = following
            ends[shard] += chunk.num_tokens
    return Score(targets, np.array(max(ends), np.int32))


def _add_bias(bias: np.ndarray, params: SamplingParams) -> None:
    """Into zeros float32 [V]."""
    if params.allowed_token_ids is not None:
        bias[:] = -np.inf
        bias[list(params.allowed_token_ids)] = 0
    for token_id, value in (params.logit_bias or {}).items():
        bias[token_id] += value


def _processors(request: Request | None) -> ProcessorArrays:
    """Of one row, without its dimension; neutral ones for None."""
    params = SamplingParams() if request is None else request.params
    words = np.full((MAX_BAD_WORDS, MAX_BAD_WORD_TOKENS), -1, np.int32)
    stop_token_ids = np.full(MAX_STOP_TOKEN_IDS, -1, np.int32)
    num_prompt_tokens = 0
    if request is not None:
        num_prompt_tokens = request.num_prompt_tokens
        stop_token_ids[: len(request.stop_token_ids)] = request.stop_token_ids
        for i, word in enumerate(request.bad_words):
            words[i, -len(word) :] = word
    return ProcessorArrays(
        presence_penalty=np.float32(params.presence_penalty),
        frequency_penalty=np.float32(params.frequency_penalty),
        repetition_penalty=np.float32(params.repetition_penalty),
        prompt_len=np.int32(num_prompt_tokens),
        min_len=np.int32(num_prompt_tokens + params.min_tokens),
        stop_token_ids=stop_token_ids,
        bad_words=words,
    )
