"""What the command gives out, to a terminal and to a file, with one tiny engine behind all the tests."""

import json
import os
import pathlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from jaxinfer import Engine, SamplingParams, bandwidth
from jaxinfer.outputs import RequestOutput
from tests import tiny_model
from tests.command_line import run_here, with_engine

PROMPTS = ("--prompt=abc", "--prompt=xyz", "--prompt=lmn")
SHORT = ("--max_tokens=6", "--temperature=0")
POISONED = ord("~") - ord("!")  # the token of "~"
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"


def open_engine(model_dir: pathlib.Path) -> Engine:
    return Engine(str(model_dir), max_num_seqs=2, max_model_len=64, decode_steps=2)


@pytest.fixture(scope="module")
def shared_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model_dir = tiny_model.make(directory, chat_template=TEMPLATE, poisoned_token=POISONED, tie_word_embeddings=False)
    with open_engine(model_dir) as engine:
        yield engine


@pytest.fixture
def engine(shared_engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Engine:
    with_engine(monkeypatch, shared_engine)
    return shared_engine


def greedy(engine: Engine, *prompts: str) -> list[RequestOutput]:
    return engine.generate(prompts, SamplingParams(max_tokens=6, temperature=0.0))


def records(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def test_the_command_streams_the_first_of_several_prompts(engine: Engine, capsys: pytest.CaptureFixture[str]):
    expected = [o.outputs[0].text for o in greedy(engine, "abc", "xyz", "lmn")]
    assert run_here(*PROMPTS, *SHORT) == 0
    captured = capsys.readouterr()
    assert captured.out == "".join(f"{p}{text}\n\n" for p, text in zip(("abc", "xyz", "lmn"), expected, strict=True))
    assert "first text after" in captured.err


def test_the_effective_sampling_is_said_once(engine: Engine, capsys: pytest.CaptureFixture[str]):
    assert run_here("--prompt=abc", *SHORT, "--min_p=0.1", "--stop=x") == 0
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sampling: ")]
    assert said == ["sampling: temperature=0.0, top_k=0, top_p=1.0, min_p=0.1, max_tokens=6, stop=('x',)"]


def test_ids_are_printed_like_text_without_a_tokenizer(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n', encoding="utf-8")
    with open_engine(tiny_model.make(tmp_path / "model", with_tokenizer=False)) as engine:
        with_engine(monkeypatch, engine)
        token_ids = engine.generate([[5, 6]], SamplingParams(max_tokens=6, temperature=0.0))[0].outputs[0].token_ids
        assert run_here(f"--prompts_file={tmp_path / 'in.jsonl'}", *SHORT) == 0
        assert capsys.readouterr().out == "5 6 " + " ".join(map(str, token_ids)) + "\n"
        assert run_here("--prompt=abc", "--chat") == 1
    assert "error: --chat needs a tokenizer and the model has none" in capsys.readouterr().err


@pytest.mark.parametrize("prompts", [("hello",), ("hello", "bye")])
def test_chat_shows_the_users_words(
    engine: Engine, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], prompts: tuple[str, ...]
):
    answers = [o.outputs[0].text for o in greedy(engine, *(f"<user>{prompt}<assistant>" for prompt in prompts))]
    flags = ("--chat", *SHORT, *(f"--prompt={prompt}" for prompt in prompts))
    assert run_here(*flags) == 0
    end = "\n" if len(prompts) == 1 else "\n\n"
    assert capsys.readouterr().out == "".join(f"{p}\n{a}{end}" for p, a in zip(prompts, answers, strict=True))
    assert run_here(*flags, f"--output_file={tmp_path / 'out.jsonl'}") == 0
    assert [(r["prompt"], r["text"]) for r in records(tmp_path / "out.jsonl")] == [*zip(prompts, answers, strict=True)]


def test_chat_takes_no_token_ids(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5, 6]}\n', encoding="utf-8")
    assert run_here("--prompt=a", f"--prompts_file={tmp_path / 'in.jsonl'}", "--chat") == 1
    assert "error: prompt 1: --chat takes prompts as text, not token ids" in capsys.readouterr().err


@pytest.mark.usefixtures("engine")
def test_an_output_that_ended_with_an_error_is_told(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    """The embedding of "~" is not a number."""
    assert run_here("--prompt=abc", "--prompt=~", *SHORT) == 1
    captured = capsys.readouterr()
    assert '1 of 2 outputs ended with finish_reason "error": the model' in captured.err.splitlines()[-1]
    assert "summary:" in captured.err and captured.out.endswith("\n\n~\n\n")
    path = tmp_path / "out.jsonl"
    assert run_here("--prompt=abc", "--prompt=~", *SHORT, f"--output_file={path}") == 1
    assert [r["finish_reason"] for r in records(path)] == ["length", "error"]


@pytest.mark.usefixtures("engine")
def test_a_token_id_out_of_range_is_one_line(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "in.jsonl").write_text('{"prompt_token_ids": [5]}\n{"prompt_token_ids": [264]}\n', encoding="utf-8")
    assert run_here(f"--prompts_file={tmp_path / 'in.jsonl'}") == 1
    assert "error: prompt 1: prompt: 264 is not a token id" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures("engine")
def test_a_link_is_followed(tmp_path: pathlib.Path):
    (tmp_path / "data").mkdir()
    target, link = tmp_path / "data" / "out.jsonl", tmp_path / "link.jsonl"
    target.write_text("old", encoding="utf-8")
    link.symlink_to(target)
    assert run_here("--prompt=abc", *SHORT, f"--output_file={link}") == 0
    assert link.is_symlink() and len(records(target)) == 1
    assert [*tmp_path.glob("**/*.partial")] == []


@pytest.mark.usefixtures("engine")
def test_a_pipe_is_written_to_and_stays_one(tmp_path: pathlib.Path):
    pipe, lines = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: lines.extend(pipe.read_text(encoding="utf-8").splitlines()))
    reader.start()
    assert run_here(*PROMPTS, *SHORT, f"--output_file={pipe}") == 0
    reader.join(timeout=10)
    assert [json.loads(line)["prompt"] for line in lines] == ["abc", "xyz", "lmn"] and pipe.is_fifo()


@pytest.mark.parametrize(("failure", "code"), [(KeyboardInterrupt(), 130), (RuntimeError("device lost"), 1)])
def test_what_was_finished_stays_after_a_failure(
    engine: Engine,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    failure: BaseException,
    code: int,
):
    path, partial, step = tmp_path / "out.jsonl", tmp_path / "out.jsonl.partial", engine.step
    path.write_text("from before", encoding="utf-8")

    def step_until_one_is_there() -> list[RequestOutput]:
        if partial.exists() and partial.read_text(encoding="utf-8").endswith("}\n"):  # it was flushed
            raise failure
        return step()

    monkeypatch.setattr(engine, "step", step_until_one_is_there)
    assert run_here(*PROMPTS, *PROMPTS, *SHORT, f"--output_file={path}") == code
    while engine.has_unfinished_requests:
        step()
    num_records = len(records(partial))
    told, last = capsys.readouterr().err.splitlines()[-2:]
    assert 0 < num_records < 6 and path.read_text(encoding="utf-8") == "from before"
    assert told == f"the {num_records} outputs that were finished are in {partial}"
    assert last == ("run_inference: interrupted" if code == 130 else "run_inference: error: device lost")


def test_a_failure_before_the_first_output_leaves_nothing(engine: Engine, tmp_path: pathlib.Path):
    long = "x" * 100
    assert run_here("--prompt=abc", f"--prompt={long}", f"--output_file={tmp_path / 'out.jsonl'}") == 1
    assert [*tmp_path.iterdir()] == []


@pytest.mark.usefixtures("engine")
def test_progress_shows_where_no_text_does(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    assert run_here(*PROMPTS, *SHORT, f"--output_file={tmp_path / 'out.jsonl'}") == 0
    assert "generating ...\ngenerating: 3 requests in " in capsys.readouterr().err
    assert run_here(*PROMPTS, *SHORT) == 0
    assert "generating" not in capsys.readouterr().err


@pytest.mark.usefixtures("engine")
def test_a_measurement_that_fails_costs_the_summary_a_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(device: object) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(bandwidth, "measure_read_bandwidth", fail)
    assert run_here("--prompt=abc", *SHORT) == 0
    summary = capsys.readouterr().err.splitlines()[-1]
    assert summary.startswith("summary: load") and summary.endswith("tokens/s")


def test_virtual_devices_share_the_bandwidth_of_the_machine(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(bandwidth, "measure_read_bandwidth", lambda device: 80e9)
    model_dir = tiny_model.make(tmp_path / "model")
    flags = (f"--model={model_dir}", "--prompt=abc", "--max_model_len=32", "--decode_steps=2", *SHORT)
    assert run_here(*flags, "--mesh=data:2", "--wait_for_programs") == 0
    assert " of 40.0 GB/s" in capsys.readouterr().err


def test_several_outputs_per_prompt(engine: Engine, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    """Each behind its prompt, in order, though the later ones may be done first; and a record each."""
    flags = ("--n=3", "--max_tokens=6", "--min_tokens=6", "--presence_penalty=0.5", "--logprobs=2")
    assert run_here(*PROMPTS[:2], *flags) == 0
    parts = capsys.readouterr().out.split("\n\n")
    assert [part[:3] for part in parts] == ["abc"] * 3 + ["xyz"] * 3 + [""]
    path = tmp_path / "out.jsonl"
    assert run_here(*PROMPTS[:2], *flags, f"--output_file={path}") == 0
    written = records(path)
    assert [(r["prompt"], r["index"]) for r in written] == [(p, i) for p in ("abc", "xyz") for i in range(3)]
    for record in written:
        assert all(entry[str(t)]["rank"] >= 1 for t, entry in zip(record["token_ids"], record["logprobs"], strict=True))
    assert run_here("--prompt=abc", *SHORT, f"--output_file={path}") == 0
    assert {"index", "logprobs"}.isdisjoint(records(path)[0])


def test_several_outputs_need_a_temperature(capsys: pytest.CaptureFixture[str]):
    assert run_here("--prompt=abc", "--n=2", "--temperature=0") == 1
    assert "error: --n=2: must be 1 with temperature=0" in capsys.readouterr().err


def test_every_sampling_flag_reaches_the_engine(engine: Engine, capsys: pytest.CaptureFixture[str]):
    names = ("min_p", "presence_penalty", "frequency_penalty", "repetition_penalty")
    flags = [f"--{name}={0.5 + i / 8}" for i, name in enumerate(names)]
    assert run_here("--prompt=abc", "--max_tokens=2", "--min_tokens=1", "--n=2", "--logprobs=4", *flags) == 0
    said = capsys.readouterr().err
    for i, name in enumerate(names):
        assert f"{name}={0.5 + i / 8}" in said
    assert "n=2" in said and "min_tokens=1" in said and "logprobs=4" in said
