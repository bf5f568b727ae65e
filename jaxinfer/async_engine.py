"""The engine for asyncio: what a server stands on.

    event loop                 intake thread                engine thread
    stream() --- prompt ---> text to Request --- add ---> EngineCore.step
    RequestStream <-------------- wake ---------------------- publish

After a step the engine's thread publishes how far each request has come and wakes the loop; a stream yields what is
new since it last looked. So there is no queue of deltas: one that is read slowly gets fewer and longer ones, and
holds up nobody.
"""

import asyncio
import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxinfer.engine import Engine
from jaxinfer.engine_core import EngineDeadError
from jaxinfer.engine_thread import EngineThread
from jaxinfer.intake import Prompt
from jaxinfer.metrics import EngineMetrics
from jaxinfer.outputs import RequestOutput
from jaxinfer.request import Reached, Request
from jaxinfer.request_stream import LiveRequest, RequestStream
from jaxinfer.resolve import check_generates
from jaxinfer.sampling_params import SamplingParams

_MAX_WAITING = 1024


class EngineOverloadedError(RuntimeError):
    """As many requests wait as may."""


class AsyncEngine:
    """An engine that one event loop uses, in `async with`.

    `AsyncEngine(model=None, **fields)` takes what `Engine` takes, and loads and compiles as that does.
    `max_waiting` is how many requests may wait to be started, those whose prompts are being encoded included. Raises
    ValueError for an encoder, too, which generates nothing.

    Every call raises EngineDeadError once the engine has died, and RuntimeError before it is entered, after it is
    closed, and from another event loop.
    """

    def __init__(self, model: str | None = None, *, max_waiting: int = _MAX_WAITING, **fields: Any):
        def make_engine() -> Engine:
            check_generates(model)  # before it is loaded
            return Engine(model, **fields)

        self._set_up(make_engine, max_waiting)
        self._owns_engine = True

    @classmethod
    def from_engine(cls, engine: Engine, *, max_waiting: int = _MAX_WAITING) -> "AsyncEngine":
        """Takes `engine` over until the AsyncEngine is closed; then it is its owner's again, and open."""
        if engine.has_unfinished_requests:
            raise ValueError("the engine has unfinished requests; finish or abort them first")
        self = cls.__new__(cls)
        self._set_up(lambda: engine, max_waiting)
        self._owns_engine = False
        return self

    def _set_up(self, make_engine: Callable[[], Engine], max_waiting: int) -> None:
        if type(max_waiting) is not int or max_waiting < 1:
            raise ValueError(f"max_waiting={max_waiting!r}: must be an integer of at least 1")
        self.engine = make_engine()
        self._core = self.engine._core
        self._max_waiting = max_waiting
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = EngineThread(self._core, self._publish, self._report_death)
        self._intake = ThreadPoolExecutor(1, "jaxinfer-intake")  # one thread: prompts arrive in order
        self._ids = itertools.count()
        self._live: dict[str, LiveRequest] = {}  # the loop's: what has not ended, by id
        self._live_of: dict[Request, LiveRequest] = {}  # the engine thread's: what was added and has not ended
        self._to_wake: dict[LiveRequest, None] = {}  # in the order in which they got on
        self._to_wake_lock = threading.Lock()
        self._death: BaseException | None = None
        self._is_closing = self._is_closed = False
        self._close_lock = asyncio.Lock()

    async def __aenter__(self) -> "AsyncEngine":
        if self._loop is not None:
            raise RuntimeError("the engine was entered before; make a new AsyncEngine")
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    async def close(self, *, drain: bool = False) -> None:
        """Takes no more requests, ends those there are, or with `drain` waits for them, and ends the thread."""
        self._check_loop()
        self._is_closing = True
        async with self._close_lock:
            if self._is_closed:
                return
            for live in [] if drain else [*self._live.values()]:
                self._abort(live)
            for live in [*self._live.values()]:
                await live.ended.wait()
            await asyncio.to_thread(self._thread.stop)
            self._intake.shutdown(wait=False)
            self._is_closed = True
            if self._owns_engine:
                self.engine.close()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestStream:
        """Queues a prompt, by this call; lower priorities run first.

        Raises EngineOverloadedError if too many requests wait, ValueError for an id that is in use. That a prompt
        cannot run shows when the stream is read.
        """
        loop = self._check_usable()
        num_waiting = sum(live.is_waiting for live in self._live.values())
        if num_waiting >= self._max_waiting:
            raise EngineOverloadedError(f"{num_waiting} requests wait and max_waiting={self._max_waiting}; try later")
        if request_id is None:
            request_id = next(name for i in self._ids if (name := f"request-{i}") not in self._live)
        elif request_id in self._live:
            raise ValueError(f"request_id={request_id!r}: an unfinished request has this id")
        live = self._live[request_id] = LiveRequest(request_id)
        params = params or self.engine.default_sampling_params
        prepare = functools.partial(self._prepare, live, prompt, params, priority, time.perf_counter())
        loop.run_in_executor(self._intake, prepare).add_done_callback(functools.partial(self._end_if_refused, live))
        return RequestStream(live, self._abort)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
    ) -> RequestOutput:
        """The whole output at once; otherwise as `stream`. Cancelling the task ends the request."""
        stream = self.stream(prompt, params, request_id=request_id, priority=priority)
        async with contextlib.aclosing(stream):
            return await stream.output()

    async def abort(self, request_id: str) -> None:
        """Ends a request; it holds nothing any more when this returns. Does nothing if it is unknown or has ended."""
        self._check_usable()
        if live := self._live.get(request_id):
            self._abort(live)
            await live.ended.wait()

    def metrics(self) -> EngineMetrics:
        """Of the engine right now. Does not wait for it."""
        return self.engine.metrics()

    def check_health(self) -> None:
        """Raises what any call would raise now."""
        self._check_usable()

    def _check_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            raise RuntimeError("the engine is not running; use `async with AsyncEngine(...) as engine`")
        if asyncio.get_running_loop() is not self._loop:
            raise RuntimeError("the engine belongs to the event loop that entered it, and this is another")
        return self._loop

    def _check_usable(self) -> asyncio.AbstractEventLoop:
        loop = self._check_loop()
        if self._is_closing:
            raise RuntimeError("the engine is closed; make a new one")
        if self._death is not None:
            raise _dead_error(self._death)
        return loop

    # In the loop's thread.

    def _wake_all(self) -> None:
        with self._to_wake_lock:
            lives, self._to_wake = self._to_wake, {}
        for live in lives:
            self._wake(live)

    def _wake(self, live: LiveRequest) -> None:
        live.changed.set()
        has_ended = live.error is not None or live.is_finished
        if has_ended and not live.ended.is_set():  # once: its id may be another one's by then
            live.ended.set()
            del self._live[live.request_id]

    def _end_if_refused(self, live: LiveRequest, prepared: asyncio.Future[None]) -> None:
        error = prepared.exception()
        if isinstance(error, Exception):
            live.error = error
            self._wake(live)

    def _die(self, cause: BaseException) -> None:
        self._death = cause
        for live in [*self._live.values()]:
            live.error = _dead_error(cause)
            self._wake(live)

    # In any thread.

    def _abort(self, live: LiveRequest) -> None:
        self._thread.post(functools.partial(self._abort_now, live))

    # In the intake thread.

    def _prepare(
        self, live: LiveRequest, prompt: Prompt, params: SamplingParams, priority: int, arrival: float
    ) -> None:
        requests = self.engine._make_requests(prompt, params, priority)
        for request in requests:
            request.arrival_time = arrival
        live.reached = [Reached() for _ in requests]
        live.requests = requests
        self._thread.post(functools.partial(self._add, live))

    # In the engine's thread.

    def _add(self, live: LiveRequest) -> None:
        for request in live.requests:
            self._core.scheduler.add(request)
            self._live_of[request] = live
        if live.is_aborted:
            self._abort_now(live)

    def _abort_now(self, live: LiveRequest) -> None:
        live.is_aborted = True
        for request in live.requests:
            if request in self._live_of:
                self._core.abort(request)
                self._publish([request])

    def _publish(self, requests: list[Request]) -> None:
        requests = [request for request in dict.fromkeys(requests) if request in self._live_of]
        lives = {self._live_of[request]: None for request in requests}
        for live in lives:
            live.reached = [request.reached for request in live.requests]
        for request in requests:
            if request.finish_reason is not None:
                del self._live_of[request]
        if not lives:
            return
        with self._to_wake_lock:
            is_asked = bool(self._to_wake)
            self._to_wake |= lives
        if not is_asked:  # one call for all until the loop comes to it, however long that takes
            self._tell_loop(self._wake_all)

    def _report_death(self, cause: BaseException) -> None:
        with contextlib.suppress(RuntimeError):  # a loop that is closed has nobody left to tell
            self._tell_loop(functools.partial(self._die, cause))

    def _tell_loop(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        self._loop.call_soon_threadsafe(callback)


def _dead_error(cause: BaseException) -> EngineDeadError:
    """A new one for everybody: each raise adds to an exception's traceback."""
    error = EngineDeadError(f"the engine has died, make a new one: {cause!r}")
    error.__cause__ = cause
    return error
