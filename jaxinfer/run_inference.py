"""`run_inference`: text from a model, from the command line.

    run_inference --prompt="Once upon a time"
    run_inference --model=path/to/model --mesh=tensor:2 --prompts_file=prompts.jsonl --output_file=out.jsonl

Text goes to stdout, everything about the run to stderr. A user's mistake ends in one line and exit code 1.
"""

import dataclasses
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from absl import app, flags, logging

from jaxinfer import devices
from jaxinfer.engine_config import DTYPES, EngineConfig
from jaxinfer.prompts import read_prompts_file
from jaxinfer.request import SamplingParams

if TYPE_CHECKING:
    from jaxinfer.engine import Engine

Prompt = str | list[int]

_START = time.perf_counter()

_DEFAULTS = EngineConfig()
_MODEL = flags.DEFINE_string("model", None, "Model directory; without it the demonstration model runs.")
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
_STOP = flags.DEFINE_multi_string("stop", [], "String that ends the output; may be repeated.")
_IGNORE_EOS = flags.DEFINE_bool("ignore_eos", False, "Go on past the model's end token.")

_MESH = flags.DEFINE_string("mesh", _DEFAULTS.mesh, 'Device mesh, as "data:2,tensor:4".')
_SHARDING = flags.DEFINE_string("sharding", _DEFAULTS.sharding, "Sharding strategy, or auto.")
_NUM_CPU_DEVICES = flags.DEFINE_integer("num_cpu_devices", None, "Virtual devices on the CPU.", lower_bound=1)
_ALLOW_CPU = flags.DEFINE_bool("allow_cpu", False, "Run on the CPU although an NVIDIA GPU is present.")
_DTYPE = flags.DEFINE_enum("dtype", _DEFAULTS.dtype, DTYPES, "Of weights and cache.")
_MAX_MODEL_LEN = flags.DEFINE_integer("max_model_len", None, "Longest prompt plus output, in tokens.")
_MAX_NUM_SEQS = flags.DEFINE_integer(
    "max_num_seqs", None, "Sequences decoded together. Default: as many as prompts, at most 8."
)
_MAX_NUM_BATCHED_TOKENS = flags.DEFINE_integer(
    "max_num_batched_tokens", _DEFAULTS.max_num_batched_tokens, "Longest piece of a prompt that is prefilled at once."
)
_PAGE_SIZE = flags.DEFINE_integer("page_size", None, "Tokens per cache page.")
_KV_CACHE_BYTES = flags.DEFINE_integer("kv_cache_bytes", None, "Cache size per device in bytes.")
_MEMORY_FRACTION = flags.DEFINE_float("memory_fraction", _DEFAULTS.memory_fraction, "Share of free memory to use.")
_DECODE_STEPS = flags.DEFINE_integer("decode_steps", _DEFAULTS.decode_steps, "Tokens per sequence and dispatch.")
_SEED = flags.DEFINE_integer("seed", _DEFAULTS.seed, "Seed of sampling.")
_ATTENTION_BACKEND = flags.DEFINE_string("attention_backend", _DEFAULTS.attention_backend, "Kernel, or auto.")
_GENERATION_CONFIG = flags.DEFINE_string(
    "generation_config", _DEFAULTS.generation_config, "auto: apply the model's generation_config.json; none: do not."
)
_COMPILATION_CACHE_DIR = flags.DEFINE_string(
    "compilation_cache_dir", "~/.cache/jaxinfer/xla", 'Where compiled programs are kept; "" for nowhere.'
)

_ENGINE_FLAGS = (
    _MODEL, _MESH, _SHARDING, _DTYPE, _MAX_MODEL_LEN, _MAX_NUM_BATCHED_TOKENS, _PAGE_SIZE, _KV_CACHE_BYTES,
    _MEMORY_FRACTION, _DECODE_STEPS, _SEED, _ATTENTION_BACKEND, _GENERATION_CONFIG,
)  # fmt: skip


os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install PyTorch


def main(argv: list[str]) -> int:
    try:
        if argv[1:]:
            raise ValueError(f"unexpected argument {argv[1]!r}; prompts are given as --prompt={argv[1]!r}")
        run()
    except (ValueError, RuntimeError, OSError) as error:
        if logging.get_verbosity() >= logging.DEBUG:
            raise
        print(f"run_inference: error: {error}", file=sys.stderr)
        return 1
    return 0


def run() -> None:
    """Checks what can be checked without jax, starts the engine, generates."""
    config = _engine_fields()
    EngineConfig(**config)
    sampling = _sampling_fields()
    prompts = _read_prompts()
    _set_up_jax()
    from jaxinfer.engine import Engine

    config["max_num_seqs"] = _MAX_NUM_SEQS.value or _default_num_seqs(len(prompts))
    with Engine(**config, show_progress=True) as engine:
        params = dataclasses.replace(engine.default_sampling_params, **sampling)
        _say(f"sampling: {params}")
        if config["generation_config"] == "auto" and engine.resolved.generation.ignored:
            _say(f"generation_config.json asks for more, not applied: {', '.join(engine.resolved.generation.ignored)}")
        if _CHAT.value:
            prompts = [*(_as_chat(engine, prompt) for prompt in prompts)]
        ready_s = time.perf_counter() - _START
        if _OUTPUT_FILE.value:
            _write_outputs(engine, prompts, params, pathlib.Path(_OUTPUT_FILE.value))
            first_token_s = None
        else:
            first_token_s = _print_outputs(engine, prompts, params)
        _print_summary(engine, ready_s, first_token_s)


def _engine_fields() -> dict[str, Any]:
    return {flag.name: flag.value for flag in _ENGINE_FLAGS}


def _default_num_seqs(num_prompts: int) -> int:
    """As many as there are prompts, at most 8, and a multiple of the data axis."""
    from jaxinfer.partitioning import parse_mesh

    data = parse_mesh(_MESH.value).get("data", 1)
    return -(-min(num_prompts, max(8, data)) // data) * data


def _read_prompts() -> list[Prompt]:
    prompts: list[Prompt] = list(_PROMPT.value)
    if _PROMPTS_FILE.value:
        prompts += read_prompts_file(pathlib.Path(_PROMPTS_FILE.value))
    elif not prompts:
        if sys.stdin.isatty():
            _say("prompts, one per line, end with Ctrl-D:")
        prompts += [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ValueError('no prompt; give --prompt="Once upon a time", --prompts_file, or lines on stdin')
    for i, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {i} is empty; give at least one character")
    return prompts


def _set_up_jax() -> None:
    if _NUM_CPU_DEVICES.value:
        devices.set_num_cpu_devices(_NUM_CPU_DEVICES.value)
        if not _ALLOW_CPU.value and devices.has_nvidia_gpu():
            os.environ.setdefault("JAX_PLATFORMS", "cpu")
    if logging.get_verbosity() < logging.DEBUG:
        logging.set_verbosity(logging.WARNING)  # jax reports each platform that it did not find
    import jax

    if _COMPILATION_CACHE_DIR.value:
        cache_dir = pathlib.Path(_COMPILATION_CACHE_DIR.value).expanduser()
        cache_dir.mkdir(parents=True, exist_ok=True, mode=0o700)  # what is in it gets executed
        jax.config.update("jax_compilation_cache_dir", str(cache_dir))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    devices.check_accelerator(_ALLOW_CPU.value or bool(_NUM_CPU_DEVICES.value))


def _sampling_fields() -> dict[str, Any]:
    """The fields of SamplingParams that flags give; the others are the model's defaults. Checked right away."""
    fields: dict[str, Any] = {f.name: f.value for f in (_TEMPERATURE, _TOP_K, _TOP_P) if f.value is not None}
    fields |= {"max_tokens": _MAX_TOKENS.value, "stop": tuple(_STOP.value), "ignore_eos": _IGNORE_EOS.value}
    try:
        SamplingParams(**fields)
    except ValueError as error:
        raise ValueError(f"--{error}") from None
    return fields


def _as_chat(engine: "Engine", prompt: Prompt) -> Prompt:
    if not isinstance(prompt, str):
        raise ValueError("--chat takes prompts as text, not token ids")
    if engine.resolved.tokenizer is None:
        raise ValueError("--chat needs a tokenizer and the model has none")
    return engine.resolved.tokenizer.apply_chat_template([{"role": "user", "content": prompt}])


def _print_outputs(engine: "Engine", prompts: list[Prompt], params: SamplingParams) -> float:
    """Streams one prompt, or prints several in order; seconds from the program's start to the first text."""
    first_token_s = 0.0
    if len(prompts) == 1:
        for delta in engine.stream(prompts[0], params):
            if not first_token_s:
                first_token_s = time.perf_counter() - _START
                print(prompts[0] if isinstance(prompts[0], str) else "", end="")
            print(delta.text if engine.resolved.tokenizer else f" {delta.token_ids}", end="", flush=True)
        print(flush=True)
        return first_token_s
    start_s = time.perf_counter() - _START
    outputs = engine.generate(prompts, params)
    for output in outputs:
        print(f"{output.prompt or output.prompt_token_ids}{output.outputs[0].text or output.outputs[0].token_ids}\n")
    return start_s + min(output.metrics.ttft_s or 0.0 for output in outputs)


def _write_outputs(engine: "Engine", prompts: list[Prompt], params: SamplingParams, path: pathlib.Path) -> None:
    """One JSON object per prompt, in order. The file appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("w") as file:
        for record in _records(engine, prompts, params):
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    partial.replace(path)
    _say(f"wrote {len(prompts)} outputs to {path}")


def _records(engine: "Engine", prompts: list[Prompt], params: SamplingParams) -> Iterator[dict[str, Any]]:
    for output in engine.generate(prompts, params):
        completion = output.outputs[0]
        yield {
            "prompt": output.prompt,
            "prompt_token_ids": output.prompt_token_ids,
            "text": completion.text,
            "token_ids": completion.token_ids,
            "finish_reason": completion.finish_reason,
        }


def _print_summary(engine: "Engine", ready_s: float, first_token_s: float | None) -> None:
    from jaxinfer.bandwidth import measure_read_bandwidth

    stats = engine.stats
    parts = [f"load {stats.load_s:.1f} s", f"compile {stats.compile_s:.1f} s", f"ready after {ready_s:.1f} s"]
    if first_token_s:
        parts.append(f"first text after {first_token_s:.1f} s")
    if stats.decode_steps:
        achieved = engine.decode_bytes_per_device / stats.decode_s
        peak = measure_read_bandwidth(engine.resolved.definition.partitioner.mesh.devices.flat[0])
        parts.append(f"{stats.decode_tokens / stats.decode_s:.1f} tokens/s")
        parts.append(f"{achieved / 1e9:.1f} of {peak / 1e9:.1f} GB/s ({achieved / peak:.0%})")
    _say("summary: " + ", ".join(parts))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def cli() -> None:
    """The console script."""
    app.run(main)


if __name__ == "__main__":
    cli()
