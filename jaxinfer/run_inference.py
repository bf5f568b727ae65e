"""`run_inference`: text from a model, from the command line.

    run_inference --prompt="Once upon a time"
    run_inference --model=path/to/model --mesh=tensor:2 --prompts_file=prompts.jsonl --output_file=out.jsonl

Text goes to stdout, everything about the run to stderr. A user's mistake ends in one line and exit code 1.
"""

import dataclasses
import io
import os
import pathlib
import signal
import sys
import time
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from jaxinfer import cli_flags, devices, engine_flags
from jaxinfer.cli_output import (
    Printer,
    Prompt,
    RecordFile,
    give_stdout_to_text,
    own_path,
    print_summary,
    run_in_order,
    say,
)
from jaxinfer.engine_config import EngineConfig
from jaxinfer.launch import find_launch
from jaxinfer.progress import Progress
from jaxinfer.prompts import read_prompts_file
from jaxinfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.engine import Engine
    from jaxinfer.process_group import ProcessGroup

_START = time.perf_counter()

_SEQS_OF_DRY_RUN = 8  # which knows of no prompts
_NUM_SEQS = "max_num_seqs"  # which process 0 tells the others, who know of no prompts
_BROKEN_PIPE, _INTERRUPTED = 141, 130  # exit codes of a shell's command that ends by the signal

os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch


def main(argv: list[str]) -> int:
    """The exit code. `argv` is what the flags left over."""
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}; prompts are given as --prompt={argv[1]!r}")
        run()
    except KeyboardInterrupt:
        say("run_inference: interrupted")
        if group := _joined_group():
            group.abort(f"{group.name} was interrupted", exit_code=_INTERRUPTED)
        return _INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough, as head does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is still buffered is flushed at exit
        return _BROKEN_PIPE
    except (ValueError, RuntimeError, OSError) as error:
        if logging.get_verbosity() >= logging.DEBUG:
            raise
        group = _joined_group()
        say(f"run_inference: {f'{group.name}: ' if group else ''}error: {error}")
        if group is not None:
            group.abort(f"{group.name} ended with an error: {error}")
        return 1
    return 0


def run() -> None:
    """Checks what can be checked without jax, starts the engine, generates.

    Raises ValueError for what cannot run, RuntimeError at the end if outputs ended with an error.
    """
    config, sampling = engine_flags.engine_fields(), cli_flags.sampling_fields()
    EngineConfig(**config)
    has_others = find_launch(**cli_flags.launch_fields()) is not None
    if cli_flags.DRY_RUN.value:
        if has_others:
            raise ValueError("--dry_run: is for one process; plan_mesh --mesh plans for several machines")
        _set_up_jax()
        _dry_run(config)
        return
    if has_others:  # from now on they are told when this process fails
        give_stdout_to_text()
        _set_up_jax()
    group = _joined_group()
    if group is not None and not group.leads:
        _follow(group, config)
        return
    prompts = _read_prompts()
    record_file = RecordFile(own_path(cli_flags.OUTPUT_FILE.value)) if cli_flags.OUTPUT_FILE.value else None
    if not has_others:
        _set_up_jax()
    from jaxinfer.compilation_cache import program_store
    from jaxinfer.engine import Engine
    from jaxinfer.resolve import check_generates

    check_generates(config.get("model"))
    config.setdefault("max_num_seqs", cli_flags.default_num_seqs(len(prompts)))
    if group is not None:
        group.all_gather(_NUM_SEQS, config["max_num_seqs"])
    with Engine(**config, show_progress=True) as engine:
        params = dataclasses.replace(engine.default_sampling_params, **sampling)
        say(f"sampling: {_describe(params)}")
        if engine.resolved.config.generation_config == "auto" and engine.resolved.generation.ignored:
            say(f"generation_config.json asks for more, not applied: {', '.join(engine.resolved.generation.ignored)}")
        inputs = [_as_chat(engine, prompt) for prompt in prompts] if cli_flags.CHAT.value else prompts
        ready_s = time.perf_counter() - _START
        printer = Printer(
            has_text=engine.resolved.tokenizer is not None,
            is_chat=cli_flags.CHAT.value,
            blank_line_after=len(prompts) * params.n > 1,
        )
        failed = []
        progress = Progress(enabled=record_file is not None)  # beside text it would be in the way
        with record_file or printer as sink, progress.generation(engine.metrics) as advance:
            was_alone = True
            for i, output in run_in_order(engine, inputs, params, advance):
                was_alone &= bool(printer.first_text_time) or not engine.is_compiling
                sink.add(prompts[i], output)
                failed += [str(i)] if any(c.finish_reason == "error" for c in output.outputs) else []
        if program_store() is not None:  # for the next start
            engine.finish_compiling()
        print_summary(engine, ready_s, printer.first_text_time and printer.first_text_time - _START, was_alone)
    if failed:
        raise RuntimeError(
            f'{len(failed)} of {len(prompts)} outputs ended with finish_reason "error": the model produced values that '
            f"are not finite; prompts {', '.join(failed[:10])}{', ...' if failed[10:] else ''}"
        )


def _dry_run(config: dict[str, Any]) -> None:
    from jaxinfer.planning import dry_run

    given = {name: value for name, value in config.items() if flags.FLAGS[name].present}
    config.setdefault("max_num_seqs", cli_flags.default_num_seqs(_SEQS_OF_DRY_RUN))
    max_tokens = cli_flags.sampling_fields()["max_tokens"]
    print(dry_run.describe(EngineConfig(**config), given, max_tokens))


def _joined_group() -> "ProcessGroup | None":
    """Of this process and the others, once they have found each other."""
    distributed = sys.modules.get("jaxinfer.distributed")
    return distributed.joined_group() if distributed else None


def _follow(group: "ProcessGroup", config: dict[str, Any]) -> None:
    """What a process other than the first does: no input, no output."""
    from jaxinfer.engine import Engine

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all, and process 0 ends all in order
    say(f"{group.name}: follows process 0")
    config.setdefault("max_num_seqs", group.all_gather(_NUM_SEQS, None)[0])
    with Engine(**config) as engine:
        engine.follow()


def _read_prompts() -> list[Prompt]:
    prompts: list[Prompt] = list(cli_flags.PROMPT.value)
    if cli_flags.PROMPTS_FILE.value:
        prompts += read_prompts_file(pathlib.Path(cli_flags.PROMPTS_FILE.value))
    elif not prompts:
        if sys.stdin.isatty():
            say("prompts, one per line, end with Ctrl-D:")
        try:
            prompts += [line.rstrip("\n") for line in sys.stdin if line.strip()]
        except UnicodeDecodeError as error:
            raise ValueError(f"stdin: not UTF-8 text: {error}") from None
    if not prompts:
        raise ValueError('no prompt; give --prompt="Once upon a time", --prompts_file, or lines on stdin')
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give at least one character")
        if cli_flags.CHAT.value and not isinstance(prompt, str):
            raise ValueError(f"prompt {i}: --chat takes prompts as text, not token ids")
    return prompts


def _set_up_jax() -> None:
    wants_cpu = cli_flags.ALLOW_CPU.value or cli_flags.NUM_CPU_DEVICES.value is not None
    if wants_cpu:
        devices.prefer_cpu()
    if cli_flags.NUM_CPU_DEVICES.value is not None:
        devices.set_num_cpu_devices(cli_flags.NUM_CPU_DEVICES.value)
    if logging.get_verbosity() < logging.DEBUG:
        logging.set_verbosity(logging.WARNING)  # jax reports each platform that it did not find
    from jaxinfer.compilation_cache import use_compilation_cache

    if problem := use_compilation_cache(cli_flags.COMPILATION_CACHE_DIR.value):
        say(f"run_inference: warning: {problem}")
    if find_launch(**cli_flags.launch_fields()) is not None:
        from jaxinfer import distributed

        distributed.initialize(**cli_flags.launch_fields())
    devices.check_accelerator(allow_cpu=wants_cpu)


def _describe(params: SamplingParams) -> str:
    """What decides the next token, and what else was asked for."""
    always, plain = ("temperature", "top_k", "top_p", "max_tokens"), SamplingParams()
    values = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    shown = {name: value for name, value in values.items() if name in always or value != getattr(plain, name)}
    return ", ".join(f"{name}={value!r}" for name, value in shown.items())


def _as_chat(engine: "Engine", prompt: Prompt) -> Prompt:
    if engine.resolved.tokenizer is None:
        raise ValueError("--chat needs a tokenizer and the model has none")
    return engine.resolved.tokenizer.apply_chat_template([{"role": "user", "content": str(prompt)}])


def cli() -> None:
    """The console script."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # None if it is closed
        sys.stdin.reconfigure(encoding="utf-8-sig")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of another encoding must not cost the run
    app.run(main, flags_parser=cli_flags.parse)


if __name__ == "__main__":
    cli()
