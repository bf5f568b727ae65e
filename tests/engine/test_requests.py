"""Requests that come and go: streams, requests added by hand, aborts, steps that fail, engines that close."""

import pathlib

import jax
import pytest

from jaxinfer import Engine
from tests import tiny_model
from tests.engine.prompts import GREEDY, solo


def test_a_stream_adds_up_to_the_text(engine: Engine):
    whole = engine.generate("Once upon", GREEDY)[0].outputs[0]
    deltas = list(engine.stream("Once upon", GREEDY))
    assert "".join(d.text for d in deltas) == whole.text
    assert [t for d in deltas for t in d.token_ids] == whole.token_ids
    assert [d.finish_reason for d in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert deltas[-1].finish_reason == whole.finish_reason


def test_leaving_a_stream_early_frees_its_pages(engine: Engine):
    for _ in engine.stream("Once upon", GREEDY):
        break  # `nothing_leaks` looks at the pool


def test_a_stream_refuses_and_queues_at_the_call(engine: Engine):
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.stream("", GREEDY)
    stream = engine.stream("abc", GREEDY)
    assert engine.has_unfinished_requests
    del stream  # never started; `nothing_leaks` looks at the pool


def test_an_aborted_stream_ends(engine: Engine):
    stream = engine.stream("abc", GREEDY)
    next(stream)
    (request_id,) = engine._unfinished
    engine.abort(request_id)
    assert [delta.finish_reason for delta in stream] == ["abort"]


def test_requests_added_by_hand_come_out_of_step_even_if_generate_ran_meanwhile(engine: Engine):
    engine.add_request("abc", GREEDY)
    engine.generate("something else", GREEDY)
    outputs = []
    while engine.has_unfinished_requests:
        outputs += engine.step()
    assert outputs[-1].prompt == "abc"
    assert outputs[-1].outputs[0].token_ids == solo(engine, outputs[-1].prompt_token_ids, GREEDY)


def test_streams_and_generate_may_interleave(engine: Engine):
    """Each once took the other's outputs away, and the other then waited for ever."""
    expected = [engine.generate(text, GREEDY)[0].outputs[0].text for text in ("one", "two", "three")]
    first, second = engine.stream("one", GREEDY), engine.stream("two", GREEDY)
    texts = [next(first).text, next(second).text]
    third = engine.generate("three", GREEDY)[0].outputs[0].text
    texts[1] += "".join(delta.text for delta in second)
    texts[0] += "".join(delta.text for delta in first)
    assert [*texts, third] == expected


def test_abort_ends_waiting_and_running_requests(engine: Engine):
    ids = [engine.add_request([1, 2, 3], GREEDY) for _ in range(6)]  # four slots: two wait
    engine.step()
    for request_id in [*ids, "unknown"]:
        engine.abort(request_id)
        engine.abort(request_id)


def test_a_step_that_fails_ends_what_ran_and_nothing_else(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    """The failed step has taken the donated cache with it. Requests in the queue still get their tokens."""
    expected = solo(engine, [1, 2, 3], GREEDY)
    ids = [engine.add_request([1, 2, 3], GREEDY) for _ in range(6)]  # four slots: two wait
    dispatch = engine._core.runner.dispatch

    def fail_on_decode(shape, *of_step):
        output = dispatch(shape, *of_step)
        if shape.chunk_tokens == 0:
            monkeypatch.undo()
            for array in jax.tree.leaves(engine._core.runner._cache):
                array.delete()
            raise RuntimeError("planted")
        return output

    monkeypatch.setattr(engine._core.runner, "dispatch", fail_on_decode)
    outputs = engine.step()  # four prompts
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()
    while engine.has_unfinished_requests:
        outputs += engine.step()
    final = {output.request_id: output.outputs[0] for output in outputs if output.finished}
    assert [final[i].finish_reason for i in ids] == ["error"] * 4 + ["length"] * 2
    assert [final[i].token_ids for i in ids[4:]] == [expected] * 2


def test_a_closed_engine_says_so(model_dir: pathlib.Path):
    with Engine(str(model_dir), **tiny_model.ONE_SLOT) as closed:
        stream = closed.stream([1, 2], GREEDY)
        next(stream)
    closed.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        closed.generate([1, 2], GREEDY)
    with pytest.raises(RuntimeError, match="the engine is closed"):
        next(stream)
