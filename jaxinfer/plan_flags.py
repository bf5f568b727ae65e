"""The flags of `plan_mesh` beside those of the engine."""

from typing import Any

from absl import flags

from jaxinfer import engine_flags
from jaxinfer.planning.workload import OBJECTIVES, Workload

_DEFAULTS = Workload()
DEVICES = flags.DEFINE_string("devices", None, "What to plan for: h100:8, h200:2x8 for 2 nodes of 8, l40s, cpu, ...")
NUM_GPUS_PER_NODE = flags.DEFINE_integer("num_gpus_per_node", None, "Where it is not the usual number.")
LINK_GB_S = flags.DEFINE_float("link_gb_s", None, "Of a device to the others of its node, one way, in GB/s.")
NETWORK_GB_S = flags.DEFINE_float("network_gb_s", None, "Of a device to other nodes, one way, in GB/s.")
LINK_LATENCY_S = flags.DEFINE_float("link_latency_s", None, "Of a collective of next to nothing, inside a node.")
NETWORK_LATENCY_S = flags.DEFINE_float("network_latency_s", None, "The same between nodes.")
MEM_FRACTION = flags.DEFINE_float("mem_fraction", 0.95, "Of a GPU's memory what JAX gets; the rest is a reserve.")
WEIGHT_DTYPE = flags.DEFINE_enum(
    "weight_dtype", "auto", ["auto", "int8", "fp8", "int4"], "What if weights were packed: no engine runs them yet."
)

OBJECTIVE = flags.DEFINE_enum("objective", _DEFAULTS.objective, OBJECTIVES, "What is best; cost: tokens/s of a device.")
PROMPT_TOKENS = flags.DEFINE_integer(
    "prompt_tokens", None, f"Of each request. Default: {_DEFAULTS.prompt_tokens}, or what the model has room for."
)
OUTPUT_TOKENS = flags.DEFINE_integer(
    "output_tokens", None, f"Of each request. Default: {_DEFAULTS.output_tokens}, or a quarter of what it has room for."
)
QPS = flags.DEFINE_float("qps", None, "Requests per second that have to be served.")
TTFT_S = flags.DEFINE_float("ttft_s", None, "Most seconds from the start of a request's prefill to its first token.")
TPOT_S = flags.DEFINE_float("tpot_s", None, "Most seconds for each further token.")

TOP = flags.DEFINE_integer("top", 10, "How many meshes to print, the best first.", lower_bound=1)
COMPILE = flags.DEFINE_integer("compile", 0, "Of how many of them to compile the steps.", lower_bound=0)
BARS = flags.DEFINE_bool("bars", False, "Show memory and times of the best as bars, too.")
PLOT = flags.DEFINE_string("plot", None, "Write the plan as a picture: a .svg or .png file.")


def parse(argv: list[str]) -> list[str]:
    """Reads the flags and the file of --config; what is left over. Ends the process in one line if they are wrong."""
    return engine_flags.parse("plan_mesh", __name__, argv)


def workload(max_position: int) -> Workload:
    """What is asked for of a model for so many tokens. Raises ValueError for what cannot be."""
    output_tokens = OUTPUT_TOKENS.value
    if output_tokens is None:
        output_tokens = min(_DEFAULTS.output_tokens, max(1, max_position // 4))
    prompt_tokens = PROMPT_TOKENS.value
    if prompt_tokens is None:
        prompt_tokens = max(1, min(_DEFAULTS.prompt_tokens, max_position - output_tokens))
    limits: dict[str, Any] = {flag.name: flag.value for flag in (OBJECTIVE, QPS, TTFT_S, TPOT_S)}
    return Workload(prompt_tokens=prompt_tokens, output_tokens=output_tokens, **limits)
