"""The engine: requests in, text out; or texts in, vectors out.

    prompt -> Intake -> Request -> EngineCore (scheduler, devices) -> RequestOutput

`step` does one turn of the core; `generate` and `stream` turn it until their requests are done. A model that generates
nothing has an Embedder in the core's place. An engine belongs to one thread.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxinfer.beam_search import beam_params, beam_search
from jaxinfer.checkpoint.reader import load_weights
from jaxinfer.compilations import num_compilations
from jaxinfer.device_memory import accounted
from jaxinfer.distributed import process_group
from jaxinfer.embedder import POOLINGS, Embedder
from jaxinfer.engine_config import EngineConfig
from jaxinfer.engine_core import EngineCore
from jaxinfer.intake import Intake, Prompt, as_prompts, read_each
from jaxinfer.lockstep import follow, runner_type
from jaxinfer.metrics import EngineMetrics
from jaxinfer.outputs import Delta, RequestOutput
from jaxinfer.progress import Progress
from jaxinfer.request import Reached, Request, output_of
from jaxinfer.resolve import ResolvedEncoder, ResolvedEngine, generates_nothing, resolve
from jaxinfer.resolve_together import resolve_together
from jaxinfer.sampling_params import SamplingParams
from jaxinfer.stats import EngineStats
from pallas_kernels.native import build


class Engine:
    """A model on a mesh, ready to generate or, if it is an encoder, to embed.

    `Engine(model=None, **fields)` takes the fields of `EngineConfig`; no model is the demonstration model. The
    constructor reads, plans, loads and compiles: after it nothing compiles any more, but for what it did not wait for
    with `wait_for_programs=False`. Raises ValueError, in one line, for a model or a setting that cannot work, before
    memory is allocated where that can be known.
    """

    def __init__(self, model: str | None = None, **fields: Any):
        config = EngineConfig(model=model, **fields)
        self._group = group = process_group()
        self.progress = Progress(enabled=config.show_progress and (group is None or group.leads))
        self.stats = EngineStats()
        if build.takes_time():
            self.progress.line("compiling kernels for this CPU, once ...")
        if group is None:
            resolved = resolve(config)
        else:
            resolved, mesh_lines = resolve_together(config, group)
            self.progress.line("\n".join(mesh_lines))
        self._resolved = resolved
        self.progress.line(resolved.summary)
        with accounted(resolved.memory, "loading and compiling"):
            with self.progress.phase("loading weights", "bytes") as advance, self.stats.timed("load_s"):
                weights = load_weights(resolved.model_dir, resolved.definition, advance)
            if isinstance(resolved, ResolvedEncoder):
                self._running = Embedder(resolved, weights, self.stats)
            else:
                self._running = EngineCore.create(resolved, weights, self.stats, runner_type(group))
                self._intake = Intake(
                    tokenizer=resolved.tokenizer,
                    generation=resolved.generation,
                    vocab_size=resolved.definition.config.vocab_size,
                    max_model_len=resolved.max_model_len,
                    seed=config.seed,
                )
            self._waits_for_programs = True
            self._running.start_compiling()
            if config.wait_for_programs or group is not None:
                self._finish_compiling("compiling")
        if group is not None:
            group.all_gather("ready", None)
        self._unfinished: dict[str, list[Request]] = {}  # all outputs of a prompt, by request id
        self._undelivered: dict[str, list[Request]] = {}  # some got on, and nobody has been told yet
        self._is_closed = False
        self._num_compilations_when_ready = num_compilations()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Frees the device memory. Unfinished requests are dropped; calling it again does nothing."""
        self._is_closed = True
        self._unfinished.clear()
        self._undelivered.clear()
        self._running.close()

    @property
    def is_compiling(self) -> bool:
        """Whether programs are still compiled beside the steps, which are slower for it."""
        return self._waits_for_programs and self._running.is_compiling

    def finish_compiling(self) -> None:
        """Returns when all programs are compiled: at once, unless `wait_for_programs` is False."""
        if self._waits_for_programs:
            self._finish_compiling("compiling the rest" if self.is_compiling else None)

    def follow(self) -> None:
        """In every process but the first: does its part of what process 0's engine does, until that is closed.

        Where several processes run an engine, each makes it with the same fields, and process 0 uses it as if it were
        alone. Raises RuntimeError in process 0.
        """
        if self._group is None or self._group.leads:
            raise RuntimeError("process 0 leads, and follows nobody; use Engine.generate")
        follow(self._core.runner, self._group)

    @property
    def resolved(self) -> ResolvedEngine:
        """What was decided about a decoder before it was loaded. Raises ValueError for an encoder."""
        if isinstance(self._resolved, ResolvedEncoder):
            raise ValueError(generates_nothing(self._resolved.architecture))
        return self._resolved

    @property
    def default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for (`generation_config="none"`: the plain defaults)."""
        return self.resolved.generation.sampling_params

    def generate(
        self, prompts: Prompt | Iterable[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[RequestOutput]:
        """Results in the order of `prompts`, which are texts or token ids; more than there are slots may be given.

        Without `params` the model's defaults apply. Raises ValueError for a prompt that cannot run, with its place
        in the list, before any runs.
        """
        prompts = as_prompts(prompts)
        params = self.default_sampling_params if params is None else params
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts but {len(each)} sampling params; give one, or one per prompt")
        groups = read_each([*zip(prompts, each, strict=True)], lambda pair: self._make_requests(*pair))
        pending = {group[0].request_id for group in groups}
        try:
            for group in groups:
                self._add(group)
            with self.progress.generation(self.metrics) as advance:
                while pending:
                    pending -= {group[0].request_id for group in self._step_for(pending) if _is_finished(group)}
                    advance(len(groups) - len(pending), len(groups))
        finally:
            for request_id in pending:
                self.abort(request_id)  # an exception cut the loop short
        return [output_of(group) for group in groups]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Text and tokens of one prompt's outputs as they come. Leaving the iterator early aborts them.

        The request is queued, and refused if it cannot run, by the call and not by the first `next`.
        """
        group = self._make_requests(prompt, params or self.default_sampling_params)
        self._add(group)
        deltas = self._deltas(group)
        next(deltas)  # into its `try`, so that an iterator that is dropped unused aborts the request as well
        return deltas

    def chat(self, messages: list[dict[str, str]], params: SamplingParams | None = None) -> RequestOutput:
        """The assistant's next message after `messages`, through the tokenizer's chat template."""
        if self.resolved.tokenizer is None:
            raise ValueError(f"{self.resolved.model_dir}: no tokenizer, so no chat template")
        return self.generate([self.resolved.tokenizer.apply_chat_template(messages)], params)[0]

    def beam_search(
        self, prompt: Prompt, *, beam_width: int, max_tokens: int = 16, length_penalty: float = 1.0
    ) -> RequestOutput:
        """The `beam_width` likeliest outputs that a search finds, best first, with their log-probabilities.

        A `length_penalty` above 1 favours long outputs, one below 1 short ones.
        """
        group = self._make_requests(prompt, beam_params(beam_width, max_tokens))
        beam_search(group, self.generate, length_penalty)
        return output_of(group)

    def embed(
        self, prompts: Prompt | Iterable[Prompt], *, pooling: str | None = None, normalize: bool = True
    ) -> np.ndarray:
        """float32 [len(prompts), D]: an encoder's vector of each prompt, of length 1 if `normalize`.

        `pooling` is "mean", of the last activations of all its tokens, or "cls", of the first; None is what the
        directory says (sentence-transformers' 1_Pooling/config.json), else the mean. Nothing is cut off. Raises
        ValueError for a decoder, and for a prompt that cannot run, with its place in the list, before any runs;
        RuntimeError for vectors that are not finite.
        """
        self._check_open()
        if not isinstance(self._running, Embedder):
            architecture = self._resolved.architecture
            raise ValueError(f"{architecture} is a decoder: it generates and has no embeddings; use Engine.generate")
        pooling = pooling or self._running.default_pooling
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r}: unknown; known: {', '.join(POOLINGS)}")
        texts = self._running.encode(as_prompts(prompts))
        with self.progress.phase("embedding", "prompts") as advance:
            vectors = self._running.embed(texts, pooling, advance)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True) if normalize else vectors

    def add_request(self, prompt: Prompt, params: SamplingParams | None = None, *, priority: int = 0) -> str:
        """Queues a prompt and returns the request's id; lower priorities run first.

        Raises ValueError for one that cannot run.
        """
        group = self._make_requests(prompt, params or self.default_sampling_params, priority)
        self._add(group)
        return group[0].request_id

    def abort(self, request_id: str) -> None:
        """Ends all outputs of a prompt and frees what they hold. Does nothing if it is unknown or finished."""
        self._undelivered.pop(request_id, None)
        for request in self._unfinished.pop(request_id, ()):
            self._core.abort(request)

    def step(self) -> list[RequestOutput]:
        """Starts a step on the devices and takes in the one before: the outputs of the requests that got on."""
        return [output_of(group) for group in self._step_for(None)]

    @property
    def has_unfinished_requests(self) -> bool:
        return bool(self._unfinished or self._undelivered)

    def metrics(self) -> EngineMetrics:
        """What the engine has done and holds right now. Any thread may ask."""
        return self._running.metrics(num_compilations() - self._num_compilations_when_ready)

    @property
    def decode_bytes_per_device(self) -> int:
        """Bytes that the decode steps so far had to read on one device: weights, and the cache in use."""
        memory = self.resolved.memory
        token_bytes = memory.page_bytes // memory.page_size
        cache_bytes = self.stats.decode_context_tokens * token_bytes // (memory.num_shards * memory.context_size)
        return self.stats.decode_steps * self.resolved.definition.step_shard_bytes + cache_bytes

    @property
    def _core(self) -> EngineCore:
        """Everything that generates comes by here. Raises ValueError for an encoder."""
        if isinstance(self._running, Embedder):
            raise ValueError(generates_nothing(self._resolved.architecture))
        return self._running

    def _finish_compiling(self, title: str | None) -> None:
        """Under a line of progress with that title. Raises what compiling raised."""
        with self.progress.phase(title, "programs") if title else contextlib.nullcontext() as advance:
            self.stats.compile_s = self._running.finish_compiling(advance)
        self._waits_for_programs = False

    def _make_requests(self, prompt: Prompt, params: SamplingParams, priority: int = 0) -> list[Request]:
        self._check_open()
        scheduler = self._core.scheduler
        requests = self._intake.make_requests(prompt, params, priority)
        scheduler.check_fits(requests[0])  # the others are as long
        return requests

    def _deltas(self, group: list[Request]) -> Iterator[Delta]:
        """What `stream` yields, after a first delta that is empty."""
        request_id, told = group[0].request_id, [Reached() for _ in group]
        try:
            yield Delta("", [], None)
            while any(reached.finish_reason is None for reached in told):
                self._step_for({request_id})
                for i, request in enumerate(group):
                    before, told[i] = told[i], request.reached
                    if told[i] != before:
                        yield request.delta(before, told[i])
        finally:
            self.abort(request_id)

    def _add(self, group: list[Request]) -> None:
        for request in group:
            self._core.scheduler.add(request)
        self._unfinished[group[0].request_id] = group

    def _step_for(self, ours: set[str] | None) -> list[list[Request]]:
        """A step, and which of `ours` (None: of all) got on; others are kept for whoever waits for them."""
        self._check_open()
        with accounted(self.resolved.memory, "running a step"):
            advanced = self._core.step()
        for request in advanced:
            if group := self._unfinished.get(request.request_id):
                self._undelivered[request.request_id] = group
                if _is_finished(group):
                    del self._unfinished[request.request_id]
        told = [request_id for request_id in self._undelivered if ours is None or request_id in ours]
        return [self._undelivered.pop(request_id) for request_id in told]

    def _check_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the engine is closed; make a new one")
        if self._group is not None and not self._group.leads:
            raise RuntimeError(f"{self._group.name} follows process 0, which decides; here call Engine.follow")


def _is_finished(group: list[Request]) -> bool:
    return all(request.finish_reason is not None for request in group)
