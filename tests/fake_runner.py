"""A runner whose model can be worked out by hand, on a cache of token ids: thousands of engine steps a second.

The next token is a hash of every token that the row can see through its block table. Whatever goes wrong with a
page, a position, a slot or a chunk changes it. The log-probability of a token is minus its position, its rank is its
id; what a slot's history holds for the full sampler is compared with what the row sees.
"""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxinfer.batch import Buckets, StepBatch, StepShape
from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.engine import Engine
from jaxinfer.engine_core import EngineCore
from jaxinfer.extras import Extras, ExtrasSpec
from jaxinfer.generation_config import GenerationDefaults
from jaxinfer.intake import Intake
from jaxinfer.logprobs import Logprobs
from jaxinfer.output_text import OutputText
from jaxinfer.outputs import Logprob, LogprobsRecord
from jaxinfer.progress import Progress
from jaxinfer.request import Request
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.scheduler import Scheduler
from jaxinfer.shard import ShardSizes
from jaxinfer.stats import EngineStats
from jaxinfer.steps import StepOutput

VOCAB_SIZE = 997
POISON = 998  # a token whose row is not finite
UNWRITTEN = -1


def next_token(tokens: np.ndarray) -> int:
    """Of int64 `tokens`, all of them and their order."""
    mixed = (tokens + 1) * (np.arange(len(tokens)) * 2654435761 % 1000003 + 1)
    return int(mixed.sum() % 1000003 % VOCAB_SIZE)


def solo(prompt: list[int], max_tokens: int, stop_token_ids: tuple[int, ...] = ()) -> list[int]:
    """What the model writes after `prompt` when nothing else runs."""
    tokens, output = np.array(prompt, np.int64), []
    while len(output) < max_tokens and (not output or output[-1] not in stop_token_ids):
        output.append(next_token(tokens))
        tokens = np.append(tokens, output[-1])
    return output


def missing_logprobs(request: Request) -> int:
    """How many of a request's log-probabilities are not there, or not what they are of these tokens."""
    assert request.logprobs is not None and request.prompt_logprobs is not None
    wanted = [{token: Logprob(-float(at), token, None)} for at, token in enumerate(request.token_ids)]
    of_prompt, of_output = wanted[1 : request.num_prompt_tokens], wanted[request.num_prompt_tokens :]
    if not of_output:  # it may have been ended before all of its prompt had run
        of_prompt = of_prompt[: len(request.prompt_logprobs.entries)]
    return sum(
        found != expected
        for found, expected in itertools.zip_longest(
            request.prompt_logprobs.entries + request.logprobs.entries, of_prompt + of_output
        )
    )


class Unreadable:
    """The result of a step that failed on the devices."""

    def __array__(self, *_):
        raise RuntimeError("failed at read")


class FakeRunner:
    """Stands in for `Runner`. `memory` [D, P, page_size] holds token ids where the real one holds keys and values.

    `fail_at` "dispatch" or "read" makes the next step raise, when it is started or when its results are read.
    `spoil_next` makes the next row that runs write poison in place of its tokens. `is_late` says at each step whether
    its program is still being compiled.
    """

    def __init__(self, buckets: Buckets, pages_per_shard: int):
        self.buckets = buckets
        self.extras_spec = ExtrasSpec.create(buckets, VOCAB_SIZE)
        self.fail_at = ""
        self.spoil_next = False
        self.is_late: Callable[[], bool] = lambda: False
        self._shape = (buckets.num_shards, pages_per_shard, buckets.page_size)
        self.reset_cache()

    def reset_cache(self) -> None:
        self.memory = np.full(self._shape, UNWRITTEN, np.int64)
        self.last_tokens = np.zeros((self._shape[0], self.buckets.rows[-1]), np.int64)
        self.stopped = np.zeros(self.last_tokens.shape, bool)
        self.history = np.full((*self.last_tokens.shape, self.extras_spec.max_len), UNWRITTEN, np.int64)

    def close(self) -> None:
        """Nothing to free."""

    def is_compiled(self, shape: StepShape, extras: Extras | None) -> bool:
        del extras
        assert shape in self.buckets.shapes()
        return not self.is_late()

    def check_compiled(self, shape: StepShape, extras: Extras | None) -> None:
        del extras
        assert shape in self.buckets.shapes()

    def dispatch(self, shape: StepShape, batch: StepBatch, extras: Extras | None = None) -> StepOutput:
        assert shape in self.buckets.shapes(), shape
        fail_at, self.fail_at = self.fail_at, ""
        if fail_at == "dispatch":
            raise RuntimeError("failed at dispatch")
        assert batch.block_tables.shape == (self._shape[0], shape.rows + shape.chunks, shape.pages)
        counts, finite = np.zeros(batch.slots.shape, np.int32), np.ones(batch.slots.shape, bool)
        tokens = np.zeros((*batch.slots.shape, shape.num_steps), np.int32)
        # As on a device, all rows of a step are written before any is read.
        for step in range(shape.num_steps):
            rows = [*self._active_rows(shape, batch, counts, finite, step)]
            if rows and self.spoil_next:
                self.spoil_next = False
                rows[0][2][:] = POISON
            for shard, row, written, start in rows:
                self._write(shard, batch.block_tables[shard, row], start, written)
            for shard, row, written, start in rows:
                seen = self._read(shard, batch.block_tables[shard, row], start + len(written))
                self._generate(shard, row, seen, batch, tokens, counts, finite, step)
                if step == 0 and extras is not None and counts[shard, row]:
                    self._check_history(shard, row, seen, batch, extras, int(tokens[shard, row, 0]), shape.rows)
        return StepOutput(
            Unreadable() if fail_at == "read" else tokens,
            counts,
            finite,
            logprobs=_fake_logprobs(batch.positions + 1, tokens[..., 0]) if extras and extras.rows else None,
            prompt_logprobs=self._score(batch, extras),
        )

    def _check_history(self, shard: int, row: int, seen, batch: StepBatch, extras: Extras, token: int, rows: int):
        slot = batch.slots[shard, row]
        for load in extras.loads:
            if load.slots[shard] == slot:
                assert row >= rows, "written when its prefill ends"
                self.history[shard, slot] = load.params.history[shard]
        if extras.rows is not None and extras.rows.is_full[shard, row]:
            np.testing.assert_array_equal(self.history[shard, slot, : len(seen)], seen)
            self.history[shard, slot, len(seen)] = token

    def _score(self, batch: StepBatch, extras: Extras | None) -> Logprobs | None:
        if extras is None or extras.score is None:
            return None
        chunks, targets = batch.chunks, extras.score.targets
        assert chunks is not None and extras.score.length == chunks.lengths.sum(axis=1).max()
        positions = np.zeros(targets.shape, np.int32)
        for shard, (starts, lengths) in enumerate(zip(chunks.starts, chunks.lengths, strict=True)):
            of_shard = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)])
            positions[shard, : len(of_shard)] = of_shard + 1
        return _fake_logprobs(positions, targets)

    def _active_rows(self, shape: StepShape, batch: StepBatch, counts, finite, step: int):
        """(shard, row, tokens to write, position of the first) of each row that runs in this step."""
        for shard, row in np.ndindex(batch.slots.shape):
            slot = batch.slots[shard, row]
            if batch.chunks is not None and row >= shape.rows:
                chunk = row - shape.rows
                length, end = batch.chunks.lengths[shard, chunk], batch.chunks.lengths[shard, : chunk + 1].sum()
                if length:
                    tokens = batch.chunks.tokens[shard, end - length : end].astype(np.int64)
                    yield shard, row, tokens, batch.chunks.starts[shard, chunk]
                continue
            is_active = slot >= 0 and not self.stopped[shard, slot] and finite[shard, row]
            if is_active and counts[shard, row] == step < batch.num_remaining[shard, row]:
                yield shard, row, self.last_tokens[shard, [slot]], batch.positions[shard, row] + step

    def _write(self, shard: int, block_table: np.ndarray, start: int, tokens: np.ndarray) -> None:
        positions = np.arange(start, start + len(tokens))
        pages = block_table[positions // self._shape[2]]
        assert (pages > 0).all(), "a token has no page"
        self.memory[shard, pages, positions % self._shape[2]] = tokens

    def _read(self, shard: int, block_table: np.ndarray, length: int) -> np.ndarray:
        positions = np.arange(length)
        seen = self.memory[shard, block_table[positions // self._shape[2]], positions % self._shape[2]]
        assert (seen != UNWRITTEN).all(), "a row sees what nobody wrote"
        return seen

    def _generate(self, shard: int, row: int, seen, batch: StepBatch, tokens, counts, finite, step: int) -> None:
        finite[shard, row] = POISON not in seen
        if batch.num_remaining[shard, row] == 0 or not finite[shard, row]:
            return
        token, slot = next_token(seen), batch.slots[shard, row]
        tokens[shard, row, step] = self.last_tokens[shard, slot] = token
        counts[shard, row] += 1
        is_last = counts[shard, row] == batch.num_remaining[shard, row]
        self.stopped[shard, slot] = is_last or token in batch.stop_token_ids[shard, row]


def _fake_logprobs(positions: np.ndarray, token_ids: np.ndarray) -> Logprobs:
    """Of the tokens at these positions."""
    empty = np.zeros((*token_ids.shape, 0))
    return Logprobs(token=-positions.astype(np.float32), rank=token_ids, top_ids=empty, top=empty)


def make_core(
    *,
    num_shards: int = 1,
    slots_per_shard: int = 4,
    pages_per_shard: int = 65,
    page_size: int = 4,
    max_model_len: int = 64,
    max_num_batched_tokens: int = 16,
    decode_steps: int = 4,
    enable_prefix_caching: bool = True,
    min_chunk: int = 32,
) -> EngineCore:
    """A scheduler and a fake runner that belong together."""
    buckets = Buckets.create(
        max_rows=slots_per_shard,
        max_model_len=max_model_len,
        max_chunk=max_num_batched_tokens,
        page_size=page_size,
        decode_steps=decode_steps,
        num_shards=num_shards,
        min_chunk=min_chunk,
    )
    sizes = ShardSizes(
        num_shards=num_shards,
        slots_per_shard=slots_per_shard,
        pages_per_shard=pages_per_shard,
        page_size=page_size,
        max_model_len=max_model_len,
    )
    scheduler = Scheduler(
        sizes,
        ChunkPolicy(max_num_batched_tokens, buckets.chunk_tokens),
        decode_steps=decode_steps,
        enable_prefix_caching=enable_prefix_caching,
    )
    return EngineCore(scheduler, FakeRunner(buckets, pages_per_shard), EngineStats())  # pyright: ignore


def make_engine(*, max_model_len: int = 64, **fields: Any) -> Engine:
    """An engine around such a core, for token ids only; `fields` are those of `make_core`."""
    engine = Engine.__new__(Engine)
    engine._running = make_core(max_model_len=max_model_len, **fields)
    engine._intake = Intake(
        tokenizer=None, generation=GenerationDefaults(), vocab_size=POISON + 1, max_model_len=max_model_len, seed=0
    )
    engine.progress = Progress(enabled=False)
    engine._unfinished, engine._undelivered = {}, {}
    engine._is_closed, engine._num_compilations_when_ready, engine._group = False, 0, None
    engine._waits_for_programs = False
    return engine


def make_request(
    number: int,
    prompt: list[int],
    max_tokens: int,
    stop_token_ids: tuple[int, ...] = (),
    priority: int = 0,
    with_logprobs: bool = False,
) -> Request:
    num_top = 0 if with_logprobs else None
    return Request(
        number=number,
        prompt=None,
        token_ids=[*prompt],
        params=SamplingParams(max_tokens=max_tokens, logprobs=num_top, prompt_logprobs=num_top),
        stop_token_ids=stop_token_ids,
        max_tokens=max_tokens,
        seed=0,
        text=OutputText(None, ()),
        logprobs=LogprobsRecord(0, None) if with_logprobs else None,
        prompt_logprobs=LogprobsRecord(0, None) if with_logprobs else None,
        priority=priority,
    )


def run(core: EngineCore, requests: list[Request]) -> None:
    """Adds all and steps until they are done, checking the books after every step."""
    for request in requests:
        core.scheduler.add(request)
    while core.has_work:
        core.step()
        core.scheduler.check()


def assert_empty(core: EngineCore) -> None:
    """Nothing waits or runs, and every page is back."""
    core.scheduler.check()
    assert not core.scheduler.has_work
    assert all(a.num_free == a.num_usable_pages for a in core.scheduler.allocators)
