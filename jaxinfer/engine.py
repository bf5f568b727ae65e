"""The engine: requests in, text out.

    add_request -> Scheduler -> StepPlan -> batch -> Runner (devices) -> commit -> RequestOutput

`step` does one turn of that wheel; `generate` and `stream` turn it until their requests are done. An engine
belongs to one thread.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxinfer import batch as batches
from jaxinfer.checkpoint.hf_reader import load_weights
from jaxinfer.engine_config import EngineConfig
from jaxinfer.output_text import OutputText
from jaxinfer.progress import Progress
from jaxinfer.request import (
    MAX_STOP_TOKEN_IDS,
    CompletionOutput,
    Delta,
    FinishReason,
    Request,
    RequestMetrics,
    RequestOutput,
    SamplingParams,
)
from jaxinfer.resolve import ResolvedEngine, resolve
from jaxinfer.runner import Runner
from jaxinfer.scheduler import DecodePlan, PrefillPlan, Scheduler
from jaxinfer.stats import EngineStats
from sharding_rules import axes as ax

Prompt = str | Sequence[int]


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
        self._request_ids = itertools.count()
        self._texts: dict[str, OutputText] = {}
        self._prompts: dict[str, str | None] = {}
        self._undelivered: list[RequestOutput] = []

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device memory. Unfinished requests are dropped; calling it again does nothing."""
        self._runner.close()

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for (`generation_config="none"`: the plain defaults)."""
        if self.resolved.config.generation_config == "none":
            return SamplingParams()
        defaults = self.resolved.generation
        return SamplingParams(temperature=defaults.temperature, top_k=defaults.top_k, top_p=defaults.top_p)

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
        for request, prompt in zip(requests, prompts, strict=True):
            self._enqueue(request, prompt)
        outputs: dict[str, RequestOutput] = {}
        ours = {request.request_id for request in requests}
        while len(outputs) < len(ours):
            for output in self._step():
                if output.request_id not in ours:
                    self._undelivered.append(output)
                elif output.finished:
                    outputs[output.request_id] = output
        return [outputs[request.request_id] for request in requests]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Text and tokens of one request as they come. Leaving the iterator early aborts the request."""
        request_id = self.add_request(prompt, params)
        num_chars = num_tokens = 0
        finished = False
        try:
            while not finished:
                for output in self._step():
                    if output.request_id != request_id:
                        self._undelivered.append(output)
                        continue
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
        self._enqueue(request, prompt)
        return request.request_id

    def abort(self, request_id: str) -> None:
        """Ends a request and frees what it holds. Does nothing if it is unknown or finished."""
        rows = itertools.chain(self._scheduler.waiting, *self._scheduler.running)
        for request in [r for r in rows if r.request_id == request_id]:
            self._finish(request, FinishReason.ABORT)
            self._forget(request)

    def step(self) -> list[RequestOutput]:
        """Runs one prefill or one dispatch of decode steps; the outputs of the requests that got on."""
        undelivered, self._undelivered = self._undelivered, []
        return undelivered + self._step()

    @property
    def has_unfinished_requests(self) -> bool:
        return self._scheduler.has_work

    def _step(self) -> list[RequestOutput]:
        plan = self._scheduler.schedule()
        if plan is None:
            return []
        touched = self._prefill(plan) if isinstance(plan, PrefillPlan) else self._decode(plan)
        outputs = [self._output(request) for request in touched]
        for request in touched:
            if request.finish_reason is not None:
                self._forget(request)
        return outputs

    def _prefill(self, plan: PrefillPlan) -> list[Request]:
        start = time.perf_counter()
        result = self._runner.prefill(batches.build_prefill(plan, self.resolved.buckets))
        touched = []
        for row, chunk in enumerate(plan.chunks):
            if chunk is None:
                continue
            chunk.request.num_cached = chunk.stop
            if not result.finite[row]:
                self._finish(chunk.request, FinishReason.ERROR)
            elif chunk.is_last:
                self._commit(chunk.request, [int(result.tokens[row])])
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
                tokens: np.ndarray = result.tokens[row, : result.counts[row]]
                num_tokens += len(tokens)
                request.num_cached += len(tokens)
                self._commit(request, tokens.tolist())
                if not result.finite[row]:
                    self._finish(request, FinishReason.ERROR)
                touched.append(request)
        self.stats.add_decode(num_tokens, self._runner.num_steps, batch.positions, time.perf_counter() - start)
        return touched

    def _commit(self, request: Request, tokens: list[int]) -> None:
        """Appends generated tokens and ends the request where they say so."""
        if not tokens:
            return
        now = time.perf_counter()
        request.first_token_time = request.first_token_time or now
        request.output_token_ids += tokens
        ended = tokens[-1] in request.stop_token_ids
        # A stop token ends the text before itself; any other token belongs to it.
        if self._texts[request.request_id].add(tokens[:-1] if ended else tokens) or ended:
            self._finish(request, FinishReason.STOP)
        elif request.num_remaining == 0:
            self._finish(request, FinishReason.LENGTH)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if request.finish_reason is None:
            request.finish_time = time.perf_counter()
            self._texts[request.request_id].finish()
            self._scheduler.finish(request, reason)

    def _forget(self, request: Request) -> None:
        self._texts.pop(request.request_id, None)
        self._prompts.pop(request.request_id, None)

    def _make_request(self, prompt: Prompt, params: SamplingParams) -> Request:
        token_ids = self._encode(prompt)
        limit = self.resolved.max_model_len
        if len(token_ids) >= limit:
            raise ValueError(
                f"prompt of {len(token_ids)} tokens leaves no room to generate within --max_model_len={limit}; "
                f"shorten it to {limit - 1} tokens or raise --max_model_len"
            )
        end = () if params.ignore_eos else self.resolved.generation.eos_token_ids
        stop_token_ids = tuple(dict.fromkeys((*end, *params.stop_token_ids)))
        self._check_token_ids("stop_token_ids", stop_token_ids)
        if len(stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise ValueError(f"{len(stop_token_ids)} stop token ids, the model's included; at most {MAX_STOP_TOKEN_IDS}")
        if params.stop and self.resolved.tokenizer is None:
            raise ValueError("stop strings need a tokenizer and the model has none; use stop_token_ids")
        number = next(self._request_ids)
        seed = params.seed if params.seed is not None else (self.resolved.config.seed * 1_000_003 + number) % 2**32
        request = Request(
            request_id=str(number),
            prompt_token_ids=token_ids,
            params=params,
            stop_token_ids=stop_token_ids,
            max_tokens=min(params.max_tokens, limit - len(token_ids)),
            seed=seed,
        )
        return request

    def _enqueue(self, request: Request, prompt: Prompt) -> None:
        self._scheduler.add(request)
        tokenizer = self.resolved.tokenizer
        stream = tokenizer and tokenizer.stream(request.params.skip_special_tokens)
        self._texts[request.request_id] = OutputText(stream, request.params.stop)
        self._prompts[request.request_id] = prompt if isinstance(prompt, str) else None

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            if self.resolved.tokenizer is None:
                raise ValueError(f"{self.resolved.model_dir}: no tokenizer there, so prompts must be token ids")
            token_ids = self.resolved.tokenizer.encode(prompt) if prompt else []
        else:
            token_ids = list(prompt)
            self._check_token_ids("prompt token ids", token_ids)
        if not token_ids:
            raise ValueError("the prompt is empty; give at least one character or token id")
        return token_ids

    def _check_token_ids(self, what: str, token_ids: Sequence[int]) -> None:
        """JAX would silently read another token's row, so the host checks every id."""
        vocab_size = self.resolved.definition.config.vocab_size
        for token_id in token_ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise ValueError(f"{what}: {token_id!r} is not a token of the model; ids are integers in [0, {vocab_size})")

    def _output(self, request: Request) -> RequestOutput:
        reason = request.finish_reason
        completion = CompletionOutput(
            index=0,
            text=self._texts[request.request_id].text,
            token_ids=list(request.output_token_ids),
            finish_reason=None if reason is None else reason.value,
        )
        first, end = request.first_token_time, request.finish_time
        return RequestOutput(
            request_id=request.request_id,
            prompt=self._prompts[request.request_id],
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            metrics=RequestMetrics(
                ttft_s=None if first is None else first - request.arrival_time,
                e2e_s=None if end is None else end - request.arrival_time,
            ),
        )


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several: a text and a list of ints are one."""
    if isinstance(prompts, str) or (len(prompts) > 0 and all(isinstance(p, int) for p in prompts)):
        return [prompts]  # pyright: ignore[reportReturnType]
    return list(prompts)  # pyright: ignore[reportArgumentType]
