"""Measures the time from a command to its first token, with no compiled programs on disk and with them.

    python tools/bench_startup.py                                   # the demonstration model, beside transformers
    python tools/bench_startup.py --model=path/to/model --peers=

What a user waits for: every start is a process of its own, and ends when it writes the first text.

    first     `run_inference` with an empty directory for compiled programs
    second    the same again
    hf        Hugging Face transformers in a process of its own, up to its first token

Rounds alternate between them. The phases are those of a second start of `Engine` in Python: what is imported, what is
decided (the tokenizer, memory, the mesh), weights, programs, the first step; and how often JAX traced, lowered and
compiled in it.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from typing import Any

from absl import app, flags

_MODEL = flags.DEFINE_string("model", None, "Hugging Face model directory; without it, the demonstration model.")
_PROMPT = flags.DEFINE_string("prompt", "Once upon a time", "What every process reads.")
_FLAGS = flags.DEFINE_list("flags", [], "More flags of run_inference, as --max_num_seqs=8.")
_PEERS = flags.DEFINE_list("peers", ["hf"], "hf, or empty.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Second starts, and starts of the peer.", lower_bound=1)
_FIRST_ROUNDS = flags.DEFINE_integer("first_rounds", 1, "First starts, which take their time.", lower_bound=1)
_CHILD = flags.DEFINE_enum("child", None, ["phases", "hf"], "What this process is for; set by the one that measures.")

_JAX_EVENTS = {
    "/jax/core/compile/jaxpr_trace_duration": "traced",
    "/jax/core/compile/jaxpr_to_mlir_module_duration": "lowered",
    "/jax/core/compile/backend_compile_duration": "compiled",
}


def _environment(home: str) -> dict[str, str]:
    """Of a user at whose home nothing is compiled yet, or not for the first time: programs, and kernels for the CPU."""
    return {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"} | {"HOME": home}


def first_text_seconds(command: list[str], home: str) -> float:
    """From the start of a process until it writes to stdout, where what it keeps lies in `home`.

    Raises RuntimeError with its stderr if it fails.
    """
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        environment = _environment(home)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, env=environment)
        with process:
            assert process.stdout is not None
            process.stdout.read(1)
            seconds = time.perf_counter() - start
            process.stdout.read()
        if process.returncode:
            errors.seek(0)
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{errors.read()}")
    return seconds


def phases(start: float) -> dict[str, Any]:
    """Seconds of each phase of this process, which somebody started at `start` of time.time()."""
    begun = time.time()
    import jax

    from jaxinfer import Engine, SamplingParams

    counts: Counter[str] = Counter()

    def count(event: str, duration_secs: float, **kwargs: str | int) -> None:
        del duration_secs, kwargs
        counts.update([_JAX_EVENTS[event]] if event in _JAX_EVENTS else [])

    jax.monitoring.register_event_duration_secs_listener(count)
    imported = time.time()
    with Engine(_MODEL.value, max_num_seqs=1) as engine:
        ready = time.time()
        next(engine.stream(_PROMPT.value, SamplingParams(temperature=0.0, max_tokens=1)))
        done = time.time()
        stats = engine.stats
        return {
            "interpreter_s": begun - start,
            "imports_s": imported - begun,
            "decisions_s": ready - imported - stats.load_s - stats.compile_s,
            "weights_s": stats.load_s,
            "programs_s": stats.compile_s,
            "first_step_s": done - ready,
            "total_s": done - start,
            **{name: counts[name] for name in _JAX_EVENTS.values()},
        }


def run_transformers() -> None:
    """Writes the first token's text."""
    import transformers

    model_dir = _MODEL.value or _demo_model()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir)
    inputs = tokenizer(_PROMPT.value, return_tensors="pt")
    tokens = model.generate(inputs["input_ids"], max_new_tokens=1, do_sample=False)
    print(tokenizer.decode(tokens[0]), flush=True)


def _new_home(homes: pathlib.Path, number: int) -> str:
    (home := homes / str(number)).mkdir(mode=0o700)
    return str(home)


def measure(homes: pathlib.Path) -> dict[str, Any]:
    """Alternating rounds; prints and returns the figures."""
    model = [f"--model={_MODEL.value}"] if _MODEL.value else []
    ours = [sys.executable, "-m", "jaxinfer.run_inference", *model, f"--prompt={_PROMPT.value}", "--max_tokens=16"]
    child = [sys.executable, __file__, *model, f"--prompt={_PROMPT.value}"]
    seconds: dict[str, list[float]] = {name: [] for name in ("first", "second", *_PEERS.value)}
    for i in range(_FIRST_ROUNDS.value):
        seconds["first"].append(first_text_seconds([*ours, *_FLAGS.value], _new_home(homes, i)))
    last, of_phases = str(homes / str(_FIRST_ROUNDS.value - 1)), []
    for _ in range(_ROUNDS.value):
        seconds["second"].append(first_text_seconds([*ours, *_FLAGS.value], last))
        for peer in _PEERS.value:
            seconds[peer].append(first_text_seconds([*child, f"--child={peer}"], last))
        told = [*child, "--child=phases", repr(time.time())]
        output = subprocess.run(told, env=_environment(last), capture_output=True, text=True, check=True)
        of_phases.append(json.loads(output.stdout.splitlines()[-1]))
    of_phases = of_phases[1:] or of_phases  # the first has a step of one sequence to compile, if the command had more
    result: dict[str, Any] = {f"{name}_s": statistics.median(of) for name, of in seconds.items()}
    for peer in _PEERS.value:
        result[f"{peer}_ratio"] = statistics.median(
            a / b for a, b in zip(seconds[peer], seconds["second"], strict=True)
        )
    result["phases"] = {name: statistics.median(found[name] for found in of_phases) for name in of_phases[0]}
    told = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in result.items() if name.endswith("_s"))
    print(f"to the first text: {told}")
    print("a second start: " + ", ".join(f"{name} {value:.2f}" for name, value in result["phases"].items()))
    return result


def _demo_model() -> pathlib.Path:
    return pathlib.Path(__file__).resolve().parents[1] / "jaxinfer" / "demo_model"


def main(argv: list[str]) -> None:
    if _CHILD.value == "phases":
        print(json.dumps(phases(float(argv[1]))))
    elif _CHILD.value == "hf":
        run_transformers()
    else:
        from jaxinfer.tools import bench_record  # children must not import jax before they time it

        with tempfile.TemporaryDirectory() as homes:
            result = measure(pathlib.Path(homes))
        packages = ("torch", "transformers") if _PEERS.value else ("transformers",)
        bench_record.print_record(bench_record.describe_run("bench_startup", packages) | {"results": result})


if __name__ == "__main__":
    app.run(main)
