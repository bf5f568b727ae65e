"""What an engine refuses, in a line that says why, before anything runs."""

import pathlib
import types

import pytest

from jaxinfer import Engine, SamplingParams
from jaxinfer.batch import StepShape
from jaxinfer.engine_core import EngineCore
from tests import fake_runner, tiny_model
from tests.engine.prompts import GREEDY


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", GREEDY, "the prompt is empty"),
        ([], GREEDY, "the prompt is empty"),
        ([5] * 256, GREEDY, "prompt of 256 tokens leaves no room to generate within --max_model_len=256"),
        ([1, 264], GREEDY, r"264 is not a token id of the model; ids are integers in \[0, 264\)"),
        ([1, -1], GREEDY, "-1 is not a token id"),
        ([2**63], GREEDY, "is not a token id"),
        ([1.5], GREEDY, "1.5 is not a token id"),
        ([True], GREEDY, "True is not a token id"),
        (None, GREEDY, "None is neither a text nor token ids"),
        ("a", SamplingParams(stop_token_ids=(999,)), "999 is not a token id"),
        ("a", SamplingParams(stop_token_ids=tuple(range(17))), "18 stop token ids, the model's 1 included; at most 16"),
    ],
)
def test_what_cannot_run_is_refused_before_anything_runs(engine: Engine, prompt, params: SamplingParams, message: str):
    with pytest.raises(ValueError, match=message):
        engine.generate([prompt], params)
    with pytest.raises(ValueError, match="prompt 1: "):
        engine.generate(["fine", prompt], params if params.stop_token_ids == () else [GREEDY, params])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": True}, "temperature=True"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.5}, "top_p=1.5"),
        ({"top_k": -2}, "top_k=-2"),
        ({"max_tokens": 0}, r"max_tokens=0: must be an integer in \[1, "),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"stop": ("",)}, "non-empty strings"),
    ],
)
def test_sampling_params_out_of_range(fields: dict, message: str):
    with pytest.raises(ValueError, match=message):
        SamplingParams(**fields)


def test_unknown_names_raise_with_the_closest_known_one():
    with pytest.raises(TypeError, match="has no field 'temprature'; did you mean 'temperature'"):
        SamplingParams(temprature=0.5)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="has no field 'max_model_length'; did you mean 'max_model_len'"):
        Engine("anywhere", max_model_length=5)


def test_as_many_params_as_prompts_or_one(engine: Engine):
    with pytest.raises(ValueError, match="2 prompts but 3 sampling params"):
        engine.generate([[1], [2]], [GREEDY] * 3)


def test_a_shape_that_was_not_compiled_is_an_error(engine: Engine):
    with pytest.raises(RuntimeError, match=r"StepShape\(chunk_tokens=5, .*\) is not a compiled shape"):
        engine._core.runner.dispatch(StepShape(5, 1, 4, 8, 1), None)  # pyright: ignore[reportArgumentType]


def test_a_prompt_that_no_pool_holds_is_named_before_any_runs():
    small = fake_runner.make_engine(pages_per_shard=9)
    with pytest.raises(ValueError, match=r"^prompt 1: prompt of 50 tokens plus max_tokens 9 needs 15 cache pages and"):
        small.generate([[1], [1] * 50], SamplingParams(max_tokens=9))
    assert not small.has_unfinished_requests and not small._core.stats.steps


def test_process_0_leads_and_the_others_follow(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    group = types.SimpleNamespace(leads=True, name="process 1 of 2")
    monkeypatch.setattr(engine, "_group", group)
    with pytest.raises(RuntimeError, match=r"process 0 leads, and follows nobody; use Engine\.generate"):
        engine.follow()
    group.leads = False
    with pytest.raises(
        RuntimeError, match=r"process 1 of 2 follows process 0, which decides; here call Engine\.follow"
    ):
        engine.generate("a", GREEDY)


def test_no_process_begins_before_all_have_compiled(model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """A process that still compiles hears no steps, and the others would wait in their collectives."""
    done: list[str] = []

    def all_gather(topic: str, value: object) -> list[object]:
        done.append(topic)
        return [value]

    def finish_compiling(self: EngineCore, progress: object) -> None:
        done.append("compiled")

    group = types.SimpleNamespace(leads=True, all_gather=all_gather, close=lambda: done.append("closed"))
    monkeypatch.setattr("jaxinfer.engine.process_group", lambda: group)
    monkeypatch.setattr(EngineCore, "finish_compiling", finish_compiling)
    Engine(str(model_dir), **tiny_model.ONE_SLOT).close()
    assert done[0] == "config" and done[-3:] == ["compiled", "ready", "closed"]
