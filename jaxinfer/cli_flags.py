"""The flags of `run_inference`, and what they ask of the engine, of sampling and of a launch."""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from jaxinfer.cli_output import say
from jaxinfer.config_file import read_config_file
from jaxinfer.engine_config import DTYPES, KV_CACHE_DTYPES, NOT_FLAGS, EngineConfig
from jaxinfer.integers import cdiv
from jaxinfer.launch import DEFAULT_HEARTBEAT_TIMEOUT_S
from jaxinfer.layouts import Layout
from jaxinfer.sampling_params import SamplingParams
from sharding_rules.axes import BATCH

_DEFAULTS = EngineConfig()
_CONFIG = flags.DEFINE_string("config", None, "TOML file of flags by name; flags on the command line override it.")
flags.DEFINE_string("model", None, "Model directory; without it the demonstration model runs.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt; may be repeated. Without any, lines of stdin are prompts.")
PROMPTS_FILE = flags.DEFINE_string(
    "prompts_file", None, "Prompts: a line each, or .jsonl with prompt or prompt_token_ids."
)
OUTPUT_FILE = flags.DEFINE_string("output_file", None, "Where to write outputs as JSON lines, instead of stdout.")
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

_MESH = flags.DEFINE_string("mesh", _DEFAULTS.mesh, 'Device mesh, as "data:2,tensor:4".')
_SHARDING = flags.DEFINE_string("sharding", _DEFAULTS.sharding, "Sharding strategy, or auto.")
NUM_CPU_DEVICES = flags.DEFINE_integer("num_cpu_devices", None, "Virtual devices on the CPU.", lower_bound=1)
ALLOW_CPU = flags.DEFINE_bool("allow_cpu", False, "Run on the CPU, though an NVIDIA GPU may be present.")
flags.DEFINE_enum("dtype", _DEFAULTS.dtype, DTYPES, "Of weights, activations and cache.")
flags.DEFINE_enum("kv_cache_dtype", _DEFAULTS.kv_cache_dtype, [*KV_CACHE_DTYPES], "Quantises the cache to 8 bits.")
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
flags.DEFINE_string("moe_backend", _DEFAULTS.moe_backend, "Kernel of experts, or auto.")
flags.DEFINE_string("expert_placement", None, "JSON file of which experts are in which slots of the mesh's devices.")
flags.DEFINE_bool("expert_counts", _DEFAULTS.expert_counts, "Count the tokens of each expert, for the metrics.")
flags.DEFINE_string(
    "generation_config", _DEFAULTS.generation_config, "auto: apply the model's generation_config.json; none: do not."
)
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


def engine_fields() -> dict[str, Any]:
    """The fields of EngineConfig that have a value; the others keep their defaults."""
    names = [field.name for field in dataclasses.fields(EngineConfig) if field.name not in NOT_FLAGS]
    return {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].value is not None}


def default_num_seqs(num_prompts: int) -> int:
    """As many as there are prompts, at most 8, and a multiple of the data shards."""
    num_shards = Layout.create(_MESH.value, _SHARDING.value).num_shards(BATCH)
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
