"""What is announced is done in its order, and a step that fails anywhere ends the job; by runners that do nothing."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from jaxinfer import frames, lockstep
from jaxinfer.batch import StepShape
from jaxinfer.extras import Extras
from jaxinfer.frames import Frame, Kind
from jaxinfer.lockstep import LeadingRunner
from jaxinfer.runner import Runner
from tests.test_frames import reader
from tests.test_lockstep import BUCKETS, step

SHAPE = BUCKETS.shapes()[0]
STEP = lockstep.encode_step(SHAPE, step(SHAPE), None)


class Ended(Exception):
    """The end of a process."""


class Group:
    """A group whose other processes say what a test lets them."""

    timeout_s = 0.5

    def __init__(self, *announcements: bytes):
        self.announced: list[Kind] = []
        self.gathered: list[str] = []
        self.why: str | None = None
        self.is_ended = threading.Event()
        self._to_come = iter(announcements)

    def next_announcement(self) -> Frame:
        return frames.read(reader(next(self._to_come)))

    def announce(self, frame: bytes) -> None:
        self.announced.append(frames.read(reader(frame)).kind)

    def all_gather(self, topic: str, value: Any, timeout_s: float | None = None) -> list[Any]:
        self.gathered.append(topic)
        return [value]

    def die(self, why: str, *, unless_told_s: float = 0.0) -> None:
        self.why = why
        self.is_ended.set()
        if not threading.current_thread().daemon:  # of which nobody would see what it raises
            raise Ended

    def close(self) -> None:
        self.announced.append(Kind.CLOSE)


class Output:
    """Of a step that takes `seconds` and then, unless `error` is None, fails."""

    def __init__(self, seconds: float = 0.0, error: Exception | None = None):
        self.seconds = seconds
        self.error = error
        self.is_done = False

    def block_until_ready(self) -> "Output":
        time.sleep(self.seconds)
        self.is_done = True
        if self.error is not None:
            raise self.error
        return self


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[Output | Exception]:
    """Of the steps of every runner, in turn; an exception is of one that cannot be started."""
    coming: list[Output | Exception] = []

    def dispatch(self: Runner, shape: StepShape, batch: Any, extras: Extras | None = None) -> Output:
        if isinstance(output := coming.pop(0), Exception):
            raise output
        return output

    monkeypatch.setattr(Runner, "__init__", lambda self: None)
    monkeypatch.setattr(Runner, "check_compiled", lambda self, shape, extras: None)
    monkeypatch.setattr(Runner, "dispatch", dispatch)
    monkeypatch.setattr(Runner, "reset_cache", lambda self: None)
    monkeypatch.setattr(Runner, "close", lambda self: None)
    return coming


@contextlib.contextmanager
def leading(group: Group) -> Iterator[LeadingRunner]:
    runner = LeadingRunner(group=group)  # pyright: ignore[reportArgumentType]
    yield runner
    runner.close()


def follow(group: Group) -> None:
    lockstep.follow(Runner(), group)  # pyright: ignore


def test_a_step_that_a_follower_cannot_start_ends_the_job(outputs: list[Output | Exception]):
    outputs.append(RuntimeError("no memory"))
    group = Group(STEP)
    with pytest.raises(Ended):
        follow(group)
    assert group.why == "could not follow: RuntimeError('no memory')"


def test_what_cannot_be_followed_ends_the_job(outputs: list[Output | Exception]):
    group = Group(frames.encode(Kind.GATHER, ["ready", None]))
    with pytest.raises(Ended):
        follow(group)
    assert group.why == "could not follow: ValueError('GATHER is nothing to follow')"


def test_a_step_that_fails_in_a_follower_ends_the_job(outputs: list[Output | Exception]):
    """Though nobody there asks for its output."""
    outputs += [Output(), Output(error=RuntimeError("a broken device"))]
    group = Group(STEP, STEP, frames.encode(Kind.CLOSE))
    follow(group)
    assert group.is_ended.wait(10)
    assert group.why == "a step failed: RuntimeError('a broken device')"


def test_a_step_that_process_0_cannot_start_ends_the_job(outputs: list[Output | Exception]):
    """The others have started it."""
    outputs.append(RuntimeError("no memory"))
    group = Group()
    with leading(group) as runner, pytest.raises(Ended):
        runner.dispatch(SHAPE, step(SHAPE))
    assert group.announced == [Kind.STEP, Kind.CLOSE]
    assert group.why == "could not start a step: RuntimeError('no memory')"


def test_a_step_that_is_not_compiled_is_not_announced(
    outputs: list[Output | Exception], monkeypatch: pytest.MonkeyPatch
):
    def refuse(self: Runner, shape: StepShape, extras: Extras | None) -> None:
        raise RuntimeError("not a compiled shape")

    monkeypatch.setattr(Runner, "check_compiled", refuse)
    group = Group()
    with leading(group) as runner, pytest.raises(RuntimeError, match="not a compiled shape"):
        runner.dispatch(SHAPE, step(SHAPE))
    assert group.announced == [Kind.CLOSE] and group.why is None


@pytest.mark.parametrize("error", [None, RuntimeError("a broken device")])
def test_process_0_asks_for_an_answer_when_its_own_steps_are_done(
    error: Exception | None, outputs: list[Output | Exception], monkeypatch: pytest.MonkeyPatch
):
    """The others answer when theirs are, which take as long: a slow step is no process that hangs."""
    slow, group = Output(seconds=0.2, error=error), Group()
    outputs.append(slow)
    monkeypatch.setattr(group, "all_gather", check_that(lambda: slow.is_done, group.all_gather))
    with leading(group) as runner:
        runner.dispatch(SHAPE, step(SHAPE))
        runner.reset_cache()
    assert group.announced == [Kind.STEP, Kind.RESET_CACHE, Kind.CLOSE]
    assert group.gathered == ["reset"]


def test_a_follower_answers_when_its_steps_are_done(outputs: list[Output | Exception], monkeypatch: pytest.MonkeyPatch):
    slow, group = Output(seconds=0.2), Group(STEP, frames.encode(Kind.RESET_CACHE), frames.encode(Kind.CLOSE))
    outputs.append(slow)
    monkeypatch.setattr(group, "all_gather", check_that(lambda: slow.is_done, group.all_gather))
    follow(group)
    assert group.gathered == ["reset"] and group.why is None


def test_who_has_followed_leaves_no_thread(outputs: list[Output | Exception]):
    """Which would keep the arrays of its last step."""
    before = threading.active_count()
    outputs.append(Output())
    follow(Group(STEP, frames.encode(Kind.CLOSE)))
    deadline = time.monotonic() + 10
    while threading.active_count() > before:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_that(is_so: Callable[[], bool], function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        assert is_so()
        return function(*args, **kwargs)

    return checked
