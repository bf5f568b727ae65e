"""One request as asyncio sees it. Host only."""

import asyncio
import dataclasses
from collections.abc import Callable, Sequence

from jaxinfer.outputs import Delta, RequestOutput
from jaxinfer.request import Reached, Request, output_of


@dataclasses.dataclass(eq=False)
class LiveRequest:
    """A request on its way between the threads of an AsyncEngine.

    Attributes:
      requests: one for each output, from the intake thread; the engine's thread has them until they have ended.
      reached: of each; replaced by the engine's thread, never changed, so that reading it takes no lock.
      is_aborted: known to the engine's thread.
      error: why it will come no further; known to the loop, as are the events.
      changed: set when there may be something new; cleared by whoever looks.
      ended: set for good.
    """

    request_id: str
    requests: Sequence[Request] = ()
    reached: Sequence[Reached] = ()
    is_aborted: bool = False
    error: Exception | None = None
    changed: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)
    ended: asyncio.Event = dataclasses.field(default_factory=asyncio.Event)

    @property
    def is_waiting(self) -> bool:
        """Whether it has not been given to the devices."""
        return all(request.start_time is None for request in self.requests)

    @property
    def is_finished(self) -> bool:
        """Whether all of its outputs are."""
        return bool(self.reached) and all(reached.finish_reason is not None for reached in self.reached)


class RequestStream:
    """Iterates over the text and tokens of one request as they come; the last delta of an output has its finish reason.

    Whoever leaves early ends the request within a step: by cancelling the task that waits here, by `aclose`, or by
    dropping the stream. Raises ValueError if the request cannot run, EngineDeadError if the engine died.
    """

    def __init__(self, live: LiveRequest, abort: Callable[[LiveRequest], None]):
        self._live = live
        self._abort = abort
        self._taken: list[Reached] = []  # of each output
        self._has_left = False

    @property
    def request_id(self) -> str:
        return self._live.request_id

    async def output(self) -> RequestOutput:
        """Waits for the end of the request: all of it, whatever was iterated over."""
        await self._live.ended.wait()
        if self._live.error is not None:
            raise self._live.error
        return dataclasses.replace(output_of(self._live.requests), request_id=self.request_id)

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
        if self._has_left or (self._taken and all(taken.finish_reason is not None for taken in self._taken)):
            raise StopAsyncIteration
        if self._live.error is not None:
            raise self._live.error
        reached = self._live.reached
        self._taken += [Reached()] * (len(reached) - len(self._taken))
        for i, now in enumerate(reached):
            before, self._taken[i] = self._taken[i], now
            if now != before:
                return self._live.requests[i].delta(before, now)
        return None

    def _leave(self) -> None:
        self._has_left = True
        if not self._live.ended.is_set():
            self._abort(self._live)
