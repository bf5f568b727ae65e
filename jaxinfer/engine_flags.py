"""The flags that say what engine is wanted, of every program that has or plans one."""

import dataclasses
import pathlib
import sys
from typing import Any

from absl import flags

from jaxinfer.cli_output import say
from jaxinfer.config_file import read_config_file
from jaxinfer.engine_config import DTYPES, KV_CACHE_DTYPES, NOT_FLAGS, EngineConfig

_DEFAULTS = EngineConfig()
_CONFIG = flags.DEFINE_string("config", None, "TOML file of flags by name; flags on the command line override it.")
flags.DEFINE_string("model", None, "Model directory; without it the demonstration model runs.")
MESH = flags.DEFINE_string("mesh", _DEFAULTS.mesh, 'Device mesh, as "data:2,tensor:4".')
SHARDING = flags.DEFINE_string("sharding", _DEFAULTS.sharding, "Sharding strategy, or auto.")
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
flags.DEFINE_bool("wait_for_programs", False, "Compile everything before the first step; else the rest beside them.")


def parse(program: str, module: str, argv: list[str]) -> list[str]:
    """Reads the flags and the file of --config; what is left over. Ends the process in one line if they are wrong.

    The flags are those here and those of `module`, where `program` has its own.
    """
    ours = [flag for name in (module, __name__) for flag in flags.FLAGS.get_flags_for_module(name)]
    for flag in ours:  # those that --help shows, also when it is another file, the console script, that runs
        flags.FLAGS.register_key_flag_for_module(argv[0], flag)
    try:
        rest = flags.FLAGS(argv)
        if _CONFIG.value:
            names = {flag.name for flag in ours} - {"config"}
            read_config_file(pathlib.Path(_CONFIG.value), flags.FLAGS, names)
    except (flags.Error, ValueError) as error:
        say(f"{program}: error: {error}")
        sys.exit(1)
    return rest


def engine_fields() -> dict[str, Any]:
    """The fields of EngineConfig that have a value; the others keep their defaults."""
    names = [field.name for field in dataclasses.fields(EngineConfig) if field.name not in NOT_FLAGS]
    return {name: flags.FLAGS[name].value for name in names if flags.FLAGS[name].value is not None}
