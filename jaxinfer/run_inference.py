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

from jaxinfer import devices
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
from jaxinfer.config_file import read_config_file
from jaxinfer.engine_config import DTYPES, NOT_FLAGS, EngineConfig
from jaxinfer.integers import cdiv
from jaxinfer.launch import DEFAULT_HEARTBEAT_TIMEOUT_S, find_launch
from jaxinfer.progress import Progress
from jaxinfer.prompts import read_prompts_file
from jaxinfer.sampling_params import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.engine import Engine
    from jaxinfer.process_group import ProcessGroup

_START = time.perf_counter()

_DEFAULTS = EngineConfig()
_CONFIG = flags.DEFINE_string("config", None, "TOML file of flags by name; flags on the command line override it.")
flags.DEFINE_string("model", None, "Model directory; without it the demonstration model runs.")
_PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt; may be repeated. Without any, lines of stdin are prompts.")
_PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "Prompts: a line each, or .jsonl with prompt or prompt_token_ids."
)
_OUTPUT_FILE = flags.DEFINE_string("output_file", None, "Where to write outputs as JSON lines, instead of stdout.")
_CHAT = flags.DEFINE_bool("chat", False, "Treat each prompt as a user's message, through the model's chat template.")

_MAX_TOKENS = flags.DEFINE_integer("max_tokens", 128, "Most tokens to generate per prompt.")
_TEMPERATURE = flags.DEFINE_float("temperature", None, "0 is greedy. Default: the model's generation_config.json.")
_TOP_K = flags.DEFINE_integer("top_k", None, "Draw among the k likeliest tokens; 0 for all.")
_TOP_P = flags.DEFINE_float("top_p", None, "Draw among the likeliest tokens whose probabilities reach this.")
_MIN_P = flags.DEFINE_float("min_p", None, "Draw among the tokens at least this times as likely as the likeliest.")
_PRESENCE_PENALTY = flags.DEFINE_float("presence_penalty", None, "Off the logits of tokens that the output has.")
_FREQUENCY_PENALTY = flags.DEFINE_float("frequency_penalty", None, "The same, for each time that it has them.")
_REPETITION_PENALTY = flags.DEFINE_float("repetition_penalty", None, "Above 1, tokens seen before are unlikelier.")
_N = flags.DEFINE_integer("n", None, "Outputs per prompt.")
_MIN_TOKENS = flags.DEFINE_integer("min_tokens", None, "Fewest tokens to generate per prompt.")
_LOGPROBS = flags.DEFINE_integer(
    "logprobs", None, "Write the log-probabilities of tokens and of this many likeliest ones to --output_file."
)
_STOP = flags.DEFINE_multi_string("stop", [], "String that ends the output; may be repeated.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on past the model's end token.")

_MESH = flags.DEFINE_string("mesh", _DEFAULTS.mesh, 'Device mesh, as "data:2,tensor:4".')
_SHARDING = flags.DEFINE_string("sharding", _DEFAULTS.sharding, "Sharding strategy, or auto.")
_NUM_CPU_DEVICES = flags.DEFINE_integer("num_cpu_devices", None, "Virtual devices on the CPU.", lower_bound=1)
_ALLOW_CPU = flags.DEFINE_bool("allow_cpu", False, "Run on the CPU, though an NVIDIA GPU may be present.")
flags.DEFINE_enum("dtype", _DEFAULTS.dtype, DTYPES, "Of weights and cache.")
flags.DEFINE_integer("max_model_len", None, "Longest prompt plus output, in tokens.")
flags.DEFINE_integer("max_num_seqs", None, "Sequences decoded together. Default: as many as prompts, at most 8.")
flags.DEFINE_integer(
    "max_num_batched_tokens", _DEFAULTS.max_num_batched_tokens, "Most tokens of a step, prefilled and decoded."
)
flags.DEFINE_integer("page_size", None, "Tokens per cache page.")
flags.DEFINE_integer("kv_cache_bytes", None, "Cache size per device in bytes.")
flags.DEFINE_float("memory_fraction", _DEFAULTS.memory_fraction, "Share of free memory to use.")
flags.DEFINE_integer("decode_steps", _DEFAULTS.decode_steps, "Tokens per sequence and dispatch when nobody waits.")
flags.DEFINE_bool("enable_prefix_caching", _DEFAULTS.enable_prefix_caching, "Prefill what prompts have in common once.")
flags.DEFINE_integer("seed", _DEFAULTS.seed, "Seed of sampling.")
flags.DEFINE_string("attention_backend", _DEFAULTS.attention_backend, "Kernel, or auto.")
flags.DEFINE_string("expert_placement", None, "JSON file of which experts are in which slots of the mesh's devices.")
flags.DEFINE_bool("expert_counts", _DEFAULTS.expert_counts, "Count the tokens of each expert, for the metrics.")
flags.DEFINE_string(
    "generation_config", _DEFAULTS.generation_config, "auto: apply the model's generation_config.json; none: do not."
)
_COMPILATION_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir",
    None,
    'Where compiled programs are kept; "" for nowhere. Default: JAX_COMPILATION_CACHE_DIR, or ~/.cache/jaxinfer/xla.',
)

_COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "Several processes: host:port of process 0. A cluster such as SLURM knows it."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which this is; 0 does all input and output.")
_HEARTBEAT_TIMEOUT_S = flags.DEFINE_integer(
    "heartbeat_timeout_s", DEFAULT_HEARTBEAT_TIMEOUT_S, "Seconds for which a process may be silent before all end."
)

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
    config, sampling = _engine_fields(), _sampling_fields()
    EngineConfig(**config)
    has_others = find_launch(**_launch_flags()) is not None
    if has_others:  # from now on they are told when this process fails
        give_stdout_to_text()
        _set_up_jax()
    group = _joined_group()
    if group is not None and not group.leads:
        _follow(group, config)
        return
    prompts = _read_prompts()
    record_file = RecordFile(own_path(_OUTPUT_FILE.value)) if _OUTPUT_FILE.value else None
    if not has_others:
        _set_up_jax()
    from jaxinfer.engine import Engine
    from jaxinfer.resolve import check_generates

    check_generates(config.get("model"))
    config.setdefault("max_num_seqs", _default_num_seqs(len(prompts)))
    if group is not None:
        group.all_gather(_NUM_SEQS, config["max_num_seqs"])
    with Engine(**config, show_progress=True) as engine:
        params = dataclasses.replace(engine.default_sampling_params, **sampling)
        say(f"sampling: {_describe(params)}")
        if engine.resolved.config.generation_config == "auto" and engine.resolved.generation.ignored:
            say(f"generation_config.json asks for more, not applied: {', '.join(engine.resolved.generation.ignored)}")
        inputs = [_as_chat(engine, prompt) for prompt in prompts] if _CHAT.value else prompts
        ready_s = time.perf_counter() - _START
        printer = Printer(
            has_text=engine.resolved.tokenizer is not None,
            is_chat=_CHAT.value,
            blank_line_after=len(prompts) * params.n > 1,
        )
        failed = []
        progress = Progress(enabled=record_file is not None)  # beside text it would be in the way
        with record_file or printer as sink, progress.generation(engine.metrics) as advance:
            for i, output in run_in_order(engine, inputs, params, advance):
                sink.add(prompts[i], output)
                failed += [str(i)] if any(c.finish_reason == "error" for c in output.outputs) else []
        print_summary(engine, ready_s, printer.first_text_time and printer.first_text_time - _START)
    if failed:
        raise RuntimeError(
            f'{len(failed)} of {len(prompts)} outputs ended with finish_reason "error": the model produced values that '
            f"are not finite; prompts {', '.join(failed[:10])}{', ...' if failed[10:] else ''}"
        )


def _launch_flags() -> dict[str, Any]:
    own = (_COORDINATOR_ADDRESS, _NUM_PROCESSES, _PROCESS_ID, _HEARTBEAT_TIMEOUT_S)
    return {flag.name: flag.value for flag in own}


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


def _engine_fields() -> dict[str, Any]:
    """The fields of EngineConfig that have a value; the others keep their defaults."""
    names = [field.name for field in dataclasses.fields(EngineConfig) if field.name not in NOT_FLAGS]
    return {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].value is not None}


def _default_num_seqs(num_prompts: int) -> int:
    """As many as there are prompts, at most 8, and a multiple of the data shards."""
    from jaxinfer.partitioning import Partitioner
    from sharding_rules.axes import BATCH

    num_shards = Partitioner.abstract(_MESH.value, _SHARDING.value).num_shards(BATCH)
    return cdiv(min(num_prompts, max(8, num_shards)), num_shards) * num_shards


def _read_prompts() -> list[Prompt]:
    prompts: list[Prompt] = list(_PROMPT.value)
    if _PROMPTS_FILE.value:
        prompts += read_prompts_file(pathlib.Path(_PROMPTS_FILE.value))
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
        if _CHAT.value and not isinstance(prompt, str):
            raise ValueError(f"prompt {i}: --chat takes prompts as text, not token ids")
    return prompts


def _set_up_jax() -> None:
    wants_cpu = _ALLOW_CPU.value or _NUM_CPU_DEVICES.value is not None
    if wants_cpu:
        devices.prefer_cpu()
    if _NUM_CPU_DEVICES.value is not None:
        devices.set_num_cpu_devices(_NUM_CPU_DEVICES.value)
    if logging.get_verbosity() < logging.DEBUG:
        logging.set_verbosity(logging.WARNING)  # jax reports each platform that it did not find
    from jaxinfer.compilation_cache import use_compilation_cache

    if problem := use_compilation_cache(_COMPILATION_CACHE_DIR.value):
        say(f"run_inference: warning: {problem}")
    if find_launch(**_launch_flags()) is not None:
        from jaxinfer import distributed

        distributed.initialize(**_launch_flags())
    devices.check_accelerator(allow_cpu=wants_cpu)


def _sampling_fields() -> dict[str, Any]:
    """The fields of SamplingParams that flags give; the others are the model's defaults. Checked right away."""
    own = (_TEMPERATURE, _TOP_K, _TOP_P, _MIN_P, _PRESENCE_PENALTY, _FREQUENCY_PENALTY, _REPETITION_PENALTY)
    own += (_N, _MIN_TOKENS, _LOGPROBS)
    fields: dict[str, Any] = {flag.name: flag.value for flag in own if flag.value is not None}
    fields |= {"max_tokens": _MAX_TOKENS.value, "stop": tuple(_STOP.value), "ignore_eos": _IGNORE_EOS.value}
    try:
        SamplingParams(**fields)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    return fields


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


def parse_flags(argv: list[str]) -> list[str]:
    """Reads the flags and the file of --config; what is left over. Ends the process in one line if they are wrong."""
    ours = flags.FLAGS.get_flags_for_module(flags.FLAGS.find_module_defining_flag("config"))
    for flag in ours:  # those that --help shows, also when it is another file, the console script, that runs
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value:
            names = {flag.name for flag in ours} - {"config"}
            read_config_file(pathlib.Path(_CONFIG.value), flags.FLAGS, names)
    except (flags.Error, ValueError) as error:
        say(f"run_inference: error: {error}")
        sys.exit(1)
    return rest


def cli() -> None:
    """The console script."""
    if isinstance(sys.stdin, io.TextIOWrapper):  # None if it is closed
        sys.stdin.reconfigure(encoding="utf-8-sig")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal of another encoding must not cost the run
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    cli()
