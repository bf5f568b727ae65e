"""The engine: requests in, text out.

    add_request -> Scheduler -> StepPlan -> batch -> Runner (devices) -> commit -> RequestOutput

`step` does one turn of that wheel; `generate` and `stream` turn it until their requests are done. An engine
belongs to one thread.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from jaxinfer import batch as batches
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.engine_config import EngineConfig
from jaxinfer.intake import Intake, Prompt
from jaxinfer.progress import Progress
from jaxinfer.request import Delta, FinishReason, Request, RequestOutput, SamplingParams
from jaxinfer.resolve import ResolvedEngine, resolve
from jaxinfer.runner import Runner
from jaxinfer.scheduler import DecodePlan, PrefillPlan, Scheduler
from jaxinfer.stats import EngineStats
from sharding_rules import axes as ax


class Engine:
    """A model on a mesh, ready to generate.

    `Engine(model=None, **fields)` takes the fields of `EngineConfig`; no model is the demonstration model. The
    constructor reads, plans, loads and compiles: after it nothing compiles any more. Raises ValueError, in one
    line, for a model or a setting that cannot work, before memory is allocated where that can be known.
    """

    def __init__(self, model: str | None = None, **fields: Any):
        config = EngineConfig(model=model, **fields)
        progress = Progress(enabled=config.show_progress)
        self.stats = EngineStats()
        self.resolved: ResolvedEngine = resolve(config)
        progress.line(str(self.resolved.memory))
        definition = self.resolved.definition
        with progress.phase("loading weights", "bytes") as advance, self.stats.timed("load_s"):
            weights = load_weights(self.resolved.model_dir, definition, advance)
        self._runner = Runner(
            definition,
            weights,
            self.resolved.cache_spec,
            self.resolved.buckets,
            num_steps=config.decode_steps,
            backend=self.resolved.attention_backend,
        )
        with progress.phase("compiling", "programs") as advance, self.stats.timed("compile_s"):
            self._runner.compile_all(advance)
        num_shards = definition.partitioner.num_shards(ax.BATCH)
        self._scheduler = Scheduler(
            num_shards=num_shards,
            pages_per_shard=self.resolved.memory.num_pages,
            page_size=self.resolved.memory.page_size,
            slots_per_shard=self.resolved.slots_per_shard,
            chunk_tokens=self.resolved.buckets.prefill_tokens[-1],
        )
        self._intake = Intake(
            tokenizer=self.resolved.tokenizer,
            generation=self.resolved.generation,
            vocab_size=definition.config.vocab_size,
            max_model_len=self.resolved.max_model_len,
            seed=config.seed,
        )
        self._undelivered: list[RequestOutput] = []
        self._is_closed = False

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device memory. Unfinished requests are dropped; calling it again does nothing."""
        self._is_closed = True
        self._runner.close()

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for (`generation_config="none"`: the plain defaults)."""
        if self.resolved.config.generation_config == "none":
            return SamplingParams()
        defaults = self.resolved.generation
        params = SamplingParams(temperature=defaults.temperature, top_k=defaults.top_k, top_p=defaults.top_p)
        return params if defaults.max_new_tokens is None else replace(params, max_tokens=defaults.max_new_tokens)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Outputs in the order of `prompts`, which are texts or token ids; more than there are slots may be given.

        Without `params` the model's defaults apply. Raises ValueError for a prompt that cannot run, with its place
        in the list, before any runs.
        """
        prompts = _as_list(prompts)
        params = self.default_sampling_params if params is None else params
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling params; give one, or one per prompt")
        requests = []
        for i, (prompt, prompt_params) in enumerate(zip(prompts, each, strict=True)):
            try:
                requests.append(self._make_request(prompt, prompt_params))
            except ValueError as error:
                raise ValueError(f"prompt {i}: {error}" if len(prompts) > 1 else str(error)) from None
        ours = [request.request_id for request in requests]
        outputs: dict[str, RequestOutput] = {}
        try:
            for request in requests:
                self._scheduler.add(request)
            while len(outputs) < len(ours):
                outputs |= {output.request_id: output for output in self._step_for(set(ours)) if output.finished}
        finally:
            for request_id in ours:
                self.abort(request_id)  # does nothing unless an exception cut the loop short
        return [outputs[request_id] for request_id in ours]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Text and tokens of one request as they come. Leaving the iterator early aborts the request."""
        request_id = self.add_request(prompt, params)
        num_chars = num_tokens = 0
        finished = False
        try:
            while not finished:
                for output in self._step_for({request_id}):
                    completion, finished = output.outputs[0], output.finished
                    yield Delta(
                        completion.text[num_chars:], completion.token_ids[num_tokens:], completion.finish_reason
                    )
                    num_chars, num_tokens = len(completion.text), len(completion.token_ids)
        finally:
            self.abort(request_id)

    def chat(self, messages: list[dict[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """The assistant's next message after `messages`, through the tokenizer's chat template."""
        if self.resolved.tokenizer is None:
            raise ValueError(f"{self.resolved.model_dir}: no tokenizer, so no chat template")
        return self.generate(self.resolved.tokenizer.apply_chat_template(messages), params)[0]

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None) -> str:
        """Queues a prompt and returns the request's id. Raises ValueError for one that cannot run."""
        request = self._make_request(prompt, params or self.default_sampling_params)
        self._scheduler.add(request)
        return request.request_id

    def abort(self, request_id: str) -> None:
        """Ends a request and frees what it holds. Does nothing if it is unknown or finished."""
        self._undelivered = [output for output in self._undelivered if output.request_id != request_id]
        rows = itertools.chain(self._scheduler.waiting, *self._scheduler.running)
        for request in [r for r in rows if r.request_id == request_id]:
            request.finish(FinishReason.ABORT)
            self._scheduler.release(request)

    def step(self) -> list[RequestOutput]:
        """Runs one prefill or one dispatch of decode steps; the outputs of the requests that got on."""
        outputs = self._step()
        undelivered, self._undelivered = self._undelivered, []
        return undelivered + outputs

    @property
    def has_unfinished_requests(self) -> bool:
        return self._scheduler.has_work

    @property
    def decode_bytes_per_device(self) -> int:
        """Bytes that the decode steps so far had to read on one device: weights once a step, and the cache in use."""
        memory = self.resolved.memory
        embedding_bytes = 0  # an embedding that is not also the head is read a row at a time
        if not self.resolved.definition.config.tie_embeddings:
            embedding = next(p for p in self.resolved.definition.params if p.path == "embedding/table")
            embedding_bytes = embedding.num_bytes // self.resolved.definition.partitioner.num_shards(ax.VOCAB)
        token_bytes = memory.page_bytes // memory.page_size
        cache_bytes = self.stats.decode_context_tokens * token_bytes // memory.num_shards
        return self.stats.decode_steps * (memory.weights_bytes - embedding_bytes) + cache_bytes

    def _make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        self._check_open()
        request = self._intake.make_request(prompt, params)
        self._scheduler.check_fits(request)
        return request

    def _step_for(self, ours: set[str]) -> list[RequestOutput]:
        """A step, and the outputs of `ours`; those of other requests are kept for whoever waits for them."""
        outputs = self.step()
        self._undelivered = [output for output in outputs if output.request_id not in ours]
        return [output for output in outputs if output.request_id in ours]

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the engine is closed; make a new one")

    def _step(self) -> list[RequestOutput]:
        self._check_open()
        plan = self._scheduler.schedule()
        if plan is None:
            return []
        try:
            touched = self._prefill(plan) if isinstance(plan, PrefillPlan) else self._decode(plan)
        except BaseException:
            self._recover()
            raise
        for request in touched:
            if request.finish_reason is not None:
                self._scheduler.release(request)
        return [request.output() for request in touched]

    def _recover(self) -> None:
        """A step that failed took the donated cache with it: running requests end with an error, waiting ones stay."""
        for request in [*itertools.chain(*self._scheduler.running)]:
            request.finish(FinishReason.ERROR)
            self._scheduler.release(request)
            self._undelivered.append(request.output())
        self._runner.reset_cache()

    def _prefill(self, plan: PrefillPlan) -> list[Request]:
        start = time.perf_counter()
        result = self._runner.prefill(batches.build_prefill(plan, self.resolved.buckets))
        touched = []
        for row, chunk in enumerate(plan.chunks):
            if chunk is None:
                continue
            chunk.request.num_cached = chunk.stop
            if not result.finite[row]:
                chunk.request.finish(FinishReason.ERROR)
            elif chunk.is_last:
                chunk.request.append([int(result.tokens[row])])
            else:
                continue
            touched.append(chunk.request)
        num_tokens = sum(chunk.stop - chunk.start for chunk in plan.chunks if chunk)
        self.stats.add_prefill(num_tokens, time.perf_counter() - start)
        return touched

    def _decode(self, plan: DecodePlan) -> list[Request]:
        start = time.perf_counter()
        batch = batches.build_decode(plan, self.resolved.buckets, self._runner.num_steps)
        result = self._runner.decode(batch)
        rows_per_shard = len(batch.tokens) // len(plan.rows)
        touched, num_tokens = [], 0
        for shard, requests in enumerate(plan.rows):
            for row, request in enumerate(requests, start=shard * rows_per_shard):
                tokens: list[int] = result.tokens[row, : result.counts[row]].tolist()
                num_tokens += len(tokens)
                request.num_cached += len(tokens)
                request.append(tokens)
                if not result.finite[row]:
                    request.finish(FinishReason.ERROR)
                touched.append(request)
        self.stats.add_decode(num_tokens, self._runner.num_steps, batch.positions, time.perf_counter() - start)
        return touched


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a text, or a sequence of numbers, is one."""
    if isinstance(prompts, str) or (prompts and not any(isinstance(p, str | Sequence) for p in prompts)):
        return [cast(Prompt, prompts)]
    return [*cast(Sequence[Prompt], prompts)]
