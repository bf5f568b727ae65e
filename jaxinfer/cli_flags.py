"""The flags of `run_inference` beside those of the engine, and what they ask of sampling and of a launch."""

from typing import Any

from absl import flags

from jaxinfer import engine_flags
from jaxinfer.integers import cdiv
from jaxinfer.launch import DEFAULT_HEARTBEAT_TIMEOUT_S
from jaxinfer.layouts import Layout
from jaxinfer.sampling_params import SamplingParams
from sharding_rules.axes import BATCH

PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt; may be repeated. Without any, lines of stdin are prompts.")
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "Prompts: a line each, or .jsonl with prompt or prompt_token_ids."
)
OUTPUT_FILE = flags.DEFINE_string("output_file", None, "Where to write outputs as JSON lines, instead of stdout.")
DRY_RUN = flags.DEFINE_bool(
    "dry_run", False, "Say what would fit, and how fast it would be expected to be; load and run nothing."
)
CHAT = flags.DEFINE_bool("chat", False, "Treat each prompt as a user's message, through the model's chat template.")

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

NUM_CPU_DEVICES = flags.DEFINE_integer("num_cpu_devices", None, "Virtual devices on the CPU.", lower_bound=1)
ALLOW_CPU = flags.DEFINE_bool("allow_cpu", False, "Run on the CPU, though an NVIDIA GPU may be present.")
COMPILATION_CACHE_DIR = flags.DEFINE_string(
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


def parse(argv: list[str]) -> list[str]:
    """Reads the flags and the file of --config; what is left over. Ends the process in one line if they are wrong."""
    return engine_flags.parse("run_inference", __name__, argv)


def default_num_seqs(num_prompts: int) -> int:
    """As many as there are prompts, at most 8, and a multiple of the data shards."""
    num_shards = Layout.create(engine_flags.MESH.value, engine_flags.SHARDING.value).num_shards(BATCH)
    return cdiv(min(num_prompts, max(8, num_shards)), num_shards) * num_shards


def sampling_fields() -> dict[str, Any]:
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


def launch_fields() -> dict[str, Any]:
    own = (_COORDINATOR_ADDRESS, _NUM_PROCESSES, _PROCESS_ID, _HEARTBEAT_TIMEOUT_S)
    return {flag.name: flag.value for flag in own}
