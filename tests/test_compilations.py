"""Programs are compiled side by side, and each can be had before the others are there."""

import pathlib
import threading
import time
from collections.abc import Iterator

import jax
import pytest

from jaxinfer import Engine, SamplingParams, compilations
from jaxinfer.batch import StepShape
from jaxinfer.compilations import Compiling, num_compilations
from jaxinfer.extras import Extras
from jaxinfer.runner import Runner
from jaxinfer.sampler_lowerings import LOAD, SCORE
from tests import tiny_model


class Workshop:
    """In place of the compiler: each program is its own name, and waits for its gate."""

    def __init__(self):
        self.begun: list[str] = []
        self.by_thread: dict[str, threading.Thread] = {}
        self.gates: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def compile(self, name: str) -> str:
        with self._lock:
            self.begun.append(name)
            self.by_thread[name] = threading.current_thread()
        assert self.gates.setdefault(name, threading.Event()).wait(60)
        if name.startswith("bad"):
            raise ValueError(name)
        return name.upper()

    def open(self, *names: str) -> None:
        for name in names:
            self.gates.setdefault(name, threading.Event()).set()


@pytest.fixture
def workshop(monkeypatch: pytest.MonkeyPatch) -> Iterator[Workshop]:
    """With two workers."""
    workshop = Workshop()
    monkeypatch.setattr(compilations, "compile_program", workshop.compile)
    monkeypatch.setattr(compilations.os, "sched_getaffinity", lambda process: {0, 1})
    yield workshop
    workshop.open(*workshop.gates)


def compiling(*names: str) -> Compiling[str]:
    return Compiling({name: name for name in names})  # pyright: ignore[reportArgumentType]


def test_the_first_is_there_while_others_are_compiled(workshop: Workshop):
    workshop.open("a")
    of = compiling("a", "b", "c", "d")
    assert of["a"] == "A" and "d" in of and "e" not in of and [*of] == ["a", "b", "c", "d"]
    workshop.open("b", "c", "d")
    seen: list[tuple[int, int]] = []
    of.wait(lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)] and workshop.begun[0] == "a"


def test_who_asks_for_one_that_nobody_has_begun_compiles_it(workshop: Workshop):
    workshop.open("d")
    of = compiling("a", "b", "c", "d")
    assert of["d"] == "D" == of["d"] and workshop.by_thread["d"] is threading.current_thread()
    assert workshop.begun.count("d") == 1 and "c" not in workshop.begun
    workshop.open("a", "b", "c")
    of.wait()
    assert sorted(workshop.begun) == ["a", "b", "c", "d"]


def test_what_is_not_begun_is_not_compiled_after_the_end(workshop: Workshop):
    of = compiling("a", "b", "c")
    while len(workshop.begun) < 2:
        time.sleep(0.01)
    threading.Timer(0.2, workshop.open, ("a", "b")).start()
    of.close()
    assert sorted(workshop.begun) == ["a", "b"]


def test_who_asks_gets_its_own_error_and_nobody_waits_for_it(workshop: Workshop):
    """Nor for what an interrupted wait has cancelled."""
    workshop.open("bad", "c")
    of = compiling("a", "b", "bad", "c")
    while len(workshop.begun) < 2:
        time.sleep(0.01)
    for _ in range(2):
        with pytest.raises(ValueError, match="bad"):
            of["bad"]
    workshop.open("a", "b")
    assert of.wait() > 0 and of.wait() > 0 and of.is_done and of["c"] == "C"
    of = compiling("a", "b", "c")
    of._pool.shutdown(cancel_futures=True)
    of.wait()
    assert of["c"] == "C"


def test_an_error_is_raised_to_who_asks_and_to_who_waits(workshop: Workshop):
    workshop.open("a", "bad")
    of = compiling("a", "bad", "c", "d")
    with pytest.raises(ValueError, match="bad"):
        of["bad"]
    workshop.open("c")
    with pytest.raises(ValueError, match="bad"):
        of.wait()


def test_an_engine_that_does_not_wait_generates_the_same(tmp_path: pathlib.Path):
    """With no program compiled when it begins, and all of them at the end."""
    model_dir = tiny_model.make(tmp_path / "tiny")
    params, texts = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True), []
    for waits in (True, False):
        with Engine(str(model_dir), **tiny_model.ONE_SLOT, wait_for_programs=waits) as engine:
            assert (engine.stats.compile_s > 0) == waits
            texts.append([engine.generate(prompt, params)[0].outputs[0].text for prompt in ("abc", "ab" * 20)])
            engine.finish_compiling()
            assert engine.stats.compile_s > 0 and engine.metrics().num_compilations_after_ready == 0
    assert texts[0] == texts[1]


def test_an_engine_that_is_closed_early_leaves_nothing_behind(tmp_path: pathlib.Path):
    before = threading.active_count()
    Engine(str(tiny_model.make(tmp_path / "tiny")), **tiny_model.ONE_SLOT, wait_for_programs=False).close()
    assert threading.active_count() <= before


def test_what_nobody_asked_for_is_counted():
    before = num_compilations()
    compilations.compile_all({})
    jax.jit(lambda x: x + before)(1.0)
    assert num_compilations() == before + 1


def test_what_nobody_will_begin_has_to_be_waited_for(workshop: Workshop):
    of = compiling("a", "b", "c")
    closing = threading.Thread(target=of.close)
    closing.start()
    while not of._futures["c"].cancelled():
        time.sleep(0.01)
    workshop.open("a", "b", "c")
    closing.join()
    assert of.has("a") and of.has("b") and not of.has("c")
    assert of["c"] == "C" and of.has("c")


def test_a_step_waits_for_the_programs_of_its_extras_too(workshop: Workshop):
    shape, some = StepShape(16, 2, 4, 1, 1), object()
    names = {shape: "step", LOAD: "load", 6: "sample", SCORE: "score"}
    workshop.open("step")
    runner = object.__new__(Runner)
    runner._programs = of = Compiling(names)  # pyright: ignore[reportArgumentType]
    of[shape]
    each = [Extras((some,), None, None), Extras((), some, None), Extras((), None, some)]  # pyright: ignore[reportArgumentType]
    assert runner.is_compiled(shape, None) and runner.is_compiled(shape, Extras((), None, None))
    assert [runner.is_compiled(shape, extras) for extras in each] == [False] * 3
    workshop.open("load", "sample", "score")
    for extras in each:
        runner.check_compiled(shape, extras)
        assert runner.is_compiled(shape, extras)
    of.close()
