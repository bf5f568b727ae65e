"""What `run_inference` gives out: text to stdout, records to a file, and what there is to say about a run."""

import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

from jaxinfer.outputs import RequestOutput
from jaxinfer.progress import Advance
from jaxinfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

Prompt = str | list[int]

_NAMES_OF_STDOUT = ("/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_OPEN_FILES = ("/dev", "/dev/fd", "/proc/self/fd")  # directories with names of this process's open files


def say(text: str) -> None:
    """Prints about the run, beside its output."""
    print(text, file=sys.stderr, flush=True)


def give_stdout_to_text() -> None:
    """From here on what libraries write to file descriptor 1, as Gloo does and NCCL may, goes to stderr."""
    old = sys.stdout
    old.flush()
    sys.stdout = open(os.dup(1), "w", encoding=old.encoding, errors=old.errors)  # noqa: SIM115
    os.dup2(2, 1)


def own_path(name: str) -> pathlib.Path:
    """Of a file with this name, where stdout is what it was before `give_stdout_to_text`."""
    return pathlib.Path(f"/dev/fd/{sys.stdout.fileno()}" if name in _NAMES_OF_STDOUT and sys.stdout else name)


def run_in_order(
    engine: "Engine", prompts: Sequence[Prompt], params: SamplingParams, advance: Advance | None = None
) -> Iterator[tuple[int, RequestOutput]]:
    """Outputs with the places of their prompts, in that order, each as soon as it and those before it are done.

    The first that is not done comes after every step, as far as it is; `advance(done, total)` is called as often.
    Raises ValueError for a prompt that cannot run, with its place, before any runs.
    """
    request_ids: list[str] = []
    for i, prompt in enumerate(prompts):
        try:
            request_ids.append(engine.add_request(prompt, params))
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}" if len(prompts) > 1 else str(error)) from None
    latest: dict[str, RequestOutput] = {}
    place = num_done = 0
    while place < len(request_ids):
        outputs = engine.step()
        latest |= {output.request_id: output for output in outputs}
        if advance is not None:
            num_done += sum(output.finished for output in outputs)
            advance(num_done, len(request_ids))
        while place < len(request_ids) and (output := latest.pop(request_ids[place], None)):
            yield place, output
            if not output.finished:
                break
            place += 1


class Printer:
    """Prints prompts and outputs to stdout as they grow, one after the other.

    Attributes:
      first_text_time: time.perf_counter() when the first text came; None before.
    """

    def __init__(self, *, has_text: bool, is_chat: bool, blank_line_after: bool):
        self.first_text_time: float | None = None
        self._has_text = has_text  # False: the model has no tokenizer, its outputs are ids
        self._is_chat = is_chat
        self._end = "\n\n" if blank_line_after else "\n"
        self._place = 0  # of the current completion among those of its prompt
        self._num_printed: int | None = None  # characters of it; None between completions

    def __enter__(self) -> "Printer":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._num_printed is not None and not isinstance(error, BrokenPipeError):
            print(flush=True)  # so that what is said about the error has a line of its own

    def add(self, prompt: Prompt, output: RequestOutput) -> None:
        """Prints what is new in `output`, its completions one after the other, each behind the prompt.

        It is the output before, or the next if that was finished.
        """
        for completion in output.outputs[self._place :]:
            new = ""
            if self._num_printed is None:
                new, self._num_printed = self._heading(prompt), 0
            text = completion.text if self._has_text else _join(completion.token_ids)
            if text and self.first_text_time is None:
                self.first_text_time = time.perf_counter()
            is_finished = completion.finish_reason is not None
            new += text[self._num_printed :] + (self._end if is_finished else "")
            print(new, end="", flush=True)
            self._num_printed = None if is_finished else len(text)
            if not is_finished:
                return
            self._place += 1
        self._place = 0

    def _heading(self, prompt: Prompt) -> str:
        if isinstance(prompt, str):
            return f"{prompt}\n" if self._is_chat else prompt  # an answer is no continuation
        return _join(prompt) + ("\n" if self._has_text else " ")


def _join(token_ids: list[int]) -> str:
    return " ".join(map(str, token_ids))


class RecordFile:
    """Writes finished outputs as JSON lines, each as soon as it is there.

    The file appears whole, under its name, or not at all: until then, and after a failure, the records are in
    NAME.partial beside it. A link is followed. What is no file, such as a pipe or a terminal, is written to directly.
    """

    def __init__(self, path: pathlib.Path):
        """Raises ValueError if nothing could be written there. Touches nothing: a failure to start costs no records."""
        if path.is_dir():
            raise ValueError(f"--output_file={path}: is a directory; name a file in it")
        self._is_stream = _is_stream(path)
        self._path = path if self._is_stream else path.resolve()
        self._partial = path if self._is_stream else self._path.with_name(self._path.name + ".partial")
        self._file: TextIO | None = None
        self._num_records = 0
        if not self._path.parent.is_dir():
            raise ValueError(f"--output_file={path}: there is no directory {self._path.parent}; make it first")
        if not self._is_stream and not os.access(self._path.parent, os.W_OK):
            raise ValueError(f"--output_file={path}: no permission to write into {self._path.parent}")

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self._file is None:
            return
        with contextlib.nullcontext() if error is None else contextlib.suppress(OSError):
            self._file.close()
        if not self._is_stream:
            self._settle(is_whole=error is None)

    def add(self, prompt: Prompt, output: RequestOutput) -> None:
        """Writes `output` if it is finished, a record per completion, with the user's prompt if that is text."""
        if not output.finished:
            return
        for completion in output.outputs:
            record = {
                "prompt": prompt if isinstance(prompt, str) else None,
                "prompt_token_ids": output.prompt_token_ids,
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
            }
            if len(output.outputs) > 1:
                record["index"] = completion.index
            if completion.logprobs is not None:
                record["logprobs"] = [
                    {token_id: dataclasses.asdict(entry) for token_id, entry in entries.items()}
                    for entries in completion.logprobs
                ]
            self._write(record)

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is None:
            # "a": behind what the shell's >> may have in the file that /dev/stdout is.
            self._file = self._partial.open("a" if self._is_stream else "w", encoding="utf-8")
        self._file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._file.flush()
        self._num_records += 1

    def _settle(self, *, is_whole: bool) -> None:
        if is_whole:
            self._partial.replace(self._path)
            say(f"wrote {self._num_records} outputs to {self._path}")
        elif self._num_records:
            say(f"the {self._num_records} outputs that were finished are in {self._partial}")
        else:
            self._partial.unlink()


def _is_stream(path: pathlib.Path) -> bool:
    """Whether `path` is no file of its own: a pipe, a device, or a name such as /dev/stdout for one that is open."""
    return path.exists() and (not path.is_file() or str(path.parent) in _OPEN_FILES)


def print_summary(engine: "Engine", ready_s: float, first_text_s: float | None, was_alone: bool) -> None:
    """Says where the time went. `ready_s` and `first_text_s` count from the program's start.

    `was_alone`: it had all programs when the first text came, so that its speed is its own.
    """
    stats = engine.stats
    parts = [f"load {stats.load_s:.1f} s", f"ready after {ready_s:.1f} s"]
    if first_text_s is not None:
        parts.append(f"first text after {first_text_s:.1f} s")
    if stats.decode_steps:
        parts.append(f"{stats.decode_tokens / stats.decode_s:.1f} tokens/s")
    if not was_alone:
        parts.append("beside the compiler" + (f", which took {stats.compile_s:.1f} s" if stats.compile_s else ""))
    elif stats.decode_steps:
        # A device without the memory to measure with must not fail a run that is finished.
        with contextlib.suppress(RuntimeError):
            parts.append(_bandwidth(engine))
    say("summary: " + ", ".join(parts))


def _bandwidth(engine: "Engine") -> str:
    """Achieved and possible bytes per second of one device."""
    from jaxinfer.bandwidth import measure_read_bandwidth

    partitioner = engine.resolved.definition.partitioner
    device = partitioner.device
    achieved = engine.decode_bytes_per_device / engine.stats.decode_s
    peak = measure_read_bandwidth(device)
    if device.platform == "cpu":
        peak /= partitioner.mesh.size  # virtual devices read the same memory at once; measured alone, one has it all
    return f"{achieved / 1e9:.1f} of {peak / 1e9:.1f} GB/s ({achieved / peak:.0%})"
