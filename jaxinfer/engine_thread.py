"""A thread that owns an EngineCore and turns it while there is work. Knows nothing of asyncio.

Others speak to the core through `post` only: what they post runs in the thread, between two steps.
"""

import logging
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue

from jaxinfer.engine_core import EngineCore, EngineDeadError
from jaxinfer.request import Request

_log = logging.getLogger(__name__)


class EngineThread:
    """Runs from `start` until `stop`, or until the engine dies.

    `on_told` gets, after a step, the requests that got tokens or ended; `on_death` what the engine died of. Both are
    called in the thread.
    """

    def __init__(
        self, core: EngineCore, on_told: Callable[[list[Request]], None], on_death: Callable[[BaseException], None]
    ):
        self._core = core
        self._on_told = on_told
        self._on_death = on_death
        # A queue whose `put` takes no lock of ours, for a destructor may post, in any thread and at any moment.
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="jaxinfer-engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def post(self, command: Callable[[], None]) -> None:
        """Has `command` run before the next step. Any thread may; after the end nothing runs any more."""
        self._commands.put(command)

    def stop(self) -> None:
        """Ends the thread after what was posted before, and waits for it."""
        self._commands.put(None)
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._obey():
                self._turn()
        except BaseException as error:
            _log.critical("the engine died", exc_info=error)
            self._on_death(error)

    def _obey(self) -> bool:
        """Runs what was posted, asleep until there is something if nothing else is to do. False: stop."""
        while True:
            try:
                command = self._commands.get(block=not self._core.has_work)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _turn(self) -> None:
        try:
            told = self._core.step()
        except EngineDeadError:
            raise
        except Exception as error:
            told = self._core.take_told()
            if not told:  # nobody's step failed, so the next one would as well, for ever
                raise
            _log.error("a step failed; the requests that took part end with an error", exc_info=error)
        if told:
            self._on_told(told)
        if not self._core.has_work:
            self._core.scheduler.check()
