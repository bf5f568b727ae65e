"""How outputs are put in order, printed and written: step by step, without an engine."""

import pathlib
import time
import types
from typing import Any

import pytest

from jaxinfer import SamplingParams, cli_output
from jaxinfer.cli_output import Printer, RecordFile, print_summary, run_in_order
from jaxinfer.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxinfer.stats import EngineStats


def output(request_id: str = "0", text: str = "", finish_reason: str | None = None, **fields: Any) -> RequestOutput:
    completion = CompletionOutput(index=0, text=text, token_ids=[1, 2, 3], finish_reason=finish_reason)
    return RequestOutput(request_id, fields.get("prompt"), [7, 8], [completion], RequestMetrics())


class ScriptedEngine:
    """An engine whose steps give what the test says."""

    def __init__(self, *steps: list[RequestOutput]):
        self._steps = list(steps)
        self._num_requests = 0

    def add_request(self, prompt: str, params: SamplingParams) -> str:
        if not prompt:
            raise ValueError("the prompt is empty")
        self._num_requests += 1
        return str(self._num_requests - 1)

    def step(self) -> list[RequestOutput]:
        return self._steps.pop(0)


def test_outputs_come_in_order_each_as_soon_as_it_can():
    engine: Any = ScriptedEngine(
        [output("0", "a"), output("1", "x", "stop")],
        [],
        [output("2", "l")],
        [output("0", "ab", "stop")],
        [output("2", "lm", "stop")],
    )
    told: list[tuple[int, int]] = []
    seen = run_in_order(engine, ["p", "q", "r"], SamplingParams(), lambda *progress: told.append(progress))
    assert [(place, o.outputs[0].text) for place, o in seen] == [(0, "a"), (0, "ab"), (1, "x"), (2, "l"), (2, "lm")]
    assert told == [(1, 3), (1, 3), (1, 3), (2, 3), (3, 3)]


def test_a_prompt_that_cannot_run_is_named():
    engine: Any = ScriptedEngine()
    with pytest.raises(ValueError, match=r"^prompt 1: the prompt is empty"):
        next(run_in_order(engine, ["p", ""], SamplingParams()))
    with pytest.raises(ValueError, match=r"^the prompt is empty"):
        next(run_in_order(engine, [""], SamplingParams()))


def test_the_printer_streams_and_knows_when_the_first_text_came(capsys: pytest.CaptureFixture[str]):
    with Printer(has_text=True, is_chat=False, blank_line_after=True) as printer:
        printer.add("p", output(text=""))
        assert printer.first_text_time is None and capsys.readouterr().out == "p"
        before = time.perf_counter()
        printer.add("p", output(text="a"))
        after, first = time.perf_counter(), printer.first_text_time
        assert capsys.readouterr().out == "a"
        printer.add("p", output(text="ab", finish_reason="stop"))
        printer.add("q", output(text="x", finish_reason="stop"))
        assert capsys.readouterr().out == "b\n\nqx\n\n"
    assert first is not None and before <= first <= after and printer.first_text_time == first


def test_what_an_open_file_is_called_is_written_to(tmp_path: pathlib.Path):
    """As --output_file=/dev/stdout >> log does."""
    log = tmp_path / "log"
    log.write_text("before\n", encoding="utf-8")
    with log.open("a") as file, RecordFile(pathlib.Path(f"/dev/fd/{file.fileno()}")) as record_file:
        record_file.add("p", output(finish_reason="stop"))
    assert log.read_text(encoding="utf-8").startswith('before\n{"prompt": "p"')


def test_where_nothing_can_be_written_is_known_at_once(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(cli_output.os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"--output_file=.*out.jsonl: no permission to write into "):
        RecordFile(tmp_path / "out.jsonl")


def test_a_speed_that_was_measured_beside_the_compiler_is_told_as_such(capsys: pytest.CaptureFixture[str]):
    stats = EngineStats(load_s=0.1, compile_s=9.0, decode_steps=4, decode_tokens=4, decode_s=0.5)
    print_summary(types.SimpleNamespace(stats=stats), 1.0, 2.0, was_alone=False)  # pyright: ignore[reportArgumentType]
    expected = (
        "load 0.1 s, ready after 1.0 s, first text after 2.0 s, 8.0 tokens/s, beside the compiler, which took 9.0 s"
    )
    assert capsys.readouterr().err == f"summary: {expected}\n"
