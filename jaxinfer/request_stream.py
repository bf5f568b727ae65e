"""One request as asyncio sees it. Host only."""

import asyncio
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from jaxinfer.request import Delta, FinishReason, Request, RequestOutput


class Reached(NamedTuple):
    """How far a request has come; `num_tokens` of its output."""

    num_tokens: int
    text: str
    finish_reason: FinishReason | None


_START = Reached(0, "", None)


@dataclasses.dataclass(eq=False)
class LiveRequest:
    """A request on its way between the threads of an AsyncEngine.

    Attributes:
      request: from the intake thread; the engine's thread has it from then on, until it has ended.
      reached: replaced as a whole by the engine's thread, so that reading it takes no lock.
      is_aborted: known to the engine's thread.
      error: why it will come no further; known to the loop, as are the events.
      changed: set when there may be something new; cleared by whoever looks.
      ended: set for good.
    """

    request_id: str
    request: Request | None = None
    reached: Reached = _START
    is_aborted: bool = False
    error: Exception | None = None
    changed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def is_waiting(self) -> bool:
        """Whether it has not been given to the devices."""
        return self.request is None or self.request.start_time is None


class RequestStream:
    """Iterates over the text and tokens of one request as they come; the last delta has the finish reason.

    Whoever leaves early ends the request within a step: by cancelling the task that waits here, by `aclose`, or by
    dropping the stream. Raises ValueError if the request cannot run, EngineDeadError if the engine died.
    """

    def __init__(self, live: LiveRequest, abort: Callable[[LiveRequest], None]):
        self._live = live
        self._abort = abort
        self._taken = _START

    @property
    def request_id(self) -> str:
        return self._live.request_id

    async def output(self) -> RequestOutput:
        """Waits for the end of the request: all of it, whatever was iterated over."""
        await self._live.ended.wait()
        if self._live.error is not None:
            raise self._live.error
        assert self._live.request is not None
        return dataclasses.replace(self._live.request.output(), request_id=self.request_id)

    def __aiter__(self) -> "RequestStream":
        return self

    async def __anext__(self) -> Delta:
        try:
            while True:
                self._live.changed.clear()
                if (delta := self._take()) is not None:
                    return delta
                await self._live.changed.wait()
        except asyncio.CancelledError:
            self._leave()
            raise

    async def aclose(self) -> None:
        """Leaves the stream."""
        self._leave()

    def __del__(self):
        self._leave()

    def _take(self) -> Delta | None:
        """What is new, or None."""
        if self._taken.finish_reason is not None:
            raise StopAsyncIteration
        if self._live.error is not None:
            raise self._live.error
        taken, now = self._taken, self._live.reached
        if now is taken or self._live.request is None:
            return None
        self._taken = now
        start = self._live.request.num_prompt_tokens
        token_ids = self._live.request.token_ids[start + taken.num_tokens : start + now.num_tokens]
        return Delta(now.text[len(taken.text) :], token_ids, now.finish_reason and now.finish_reason.value)

    def _leave(self) -> None:
        self._taken = self._taken._replace(finish_reason=FinishReason.ABORT)
        if not self._live.ended.is_set():
            self._abort(self._live)
