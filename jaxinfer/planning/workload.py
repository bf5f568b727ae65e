"""What a plan is asked for, and what a mesh of devices would deliver. Host only."""

import collections
import dataclasses
import math
from collections.abc import Callable, Mapping

from jaxinfer.chunk_policy import ChunkPolicy
from jaxinfer.integers import cdiv
from jaxinfer.planning.loads import Load
from jaxinfer.planning.roofline import MeshModel, StepTime
from jaxinfer.step_plan import num_chunks
from jaxinfer.unknown_names import suggestion
from sharding_rules import axes as ax

OBJECTIVES = ("latency", "throughput", "cost")
DEFAULT_CHUNK = {"cpu": 512, "gpu": 2048}  # tokens of a step; fewer do not keep a GPU's matrix units busy


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload:
    """Requests that are all alike, and what they may take.

    Attributes:
      prompt_tokens, output_tokens: of each request.
      objective: "latency" of a request, "throughput" of all devices, or "cost", throughput for each device.
      qps: requests per second that have to be served; None: as many as can be, or one at a time for latency.
      ttft_s: most seconds to a request's first token once its prefill begins; None: any.
      tpot_s: most seconds for each further token; None: any.
    """

    prompt_tokens: int = 1024
    output_tokens: int = 256
    objective: str = "throughput"
    qps: float | None = None
    ttft_s: float | None = None
    tpot_s: float | None = None

    def __post_init__(self):
        if self.objective not in OBJECTIVES:
            raise ValueError(f"--objective={self.objective}: unknown; {suggestion(self.objective, OBJECTIVES)}")
        for name in ("prompt_tokens", "output_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"--{name}={value}: must be at least 1")
        for name in ("qps", "ttft_s", "tpot_s"):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"--{name}={value}: must be above 0")

    @property
    def num_tokens(self) -> int:
        """Of a request, from its first to its last."""
        return self.prompt_tokens + self.output_tokens

    def decode_load(self, rows: int) -> Load:
        """Of a step in which so many requests get a token each."""
        return Load(rows, self.prompt_tokens + self.output_tokens / 2)

    def prefill_load(self, num_tokens: int, rows: int, policy: ChunkPolicy) -> Load:
        """Of a step that prefills so many tokens of as few of `rows` requests as can be, while the others decode."""
        return self.decode_load(_beside(rows))._replace(
            chunk_tokens=num_tokens,
            chunk_context=self.prompt_tokens / 2,
            chunk_spread=self.prompt_tokens,
            num_prompts=cdiv(num_tokens, self.prompt_tokens),
            num_chunks=num_chunks(rows),
            padding=policy.padded(num_tokens) - num_tokens,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performance:
    """Expected of a mesh on which so many requests are under way.

    Attributes:
      num_seqs: requests at once, over the whole mesh.
      decode: of a step that prefills nothing.
      prefill_load: of a step that prefills as much as any.
      ttft_s: from the start of a prompt's prefill to its first token, beside the others' decoding; no queue.
      tpot_s: for each further token, with the prompts of others in between.
      tokens_per_s: generated, of all requests.
    """

    num_seqs: int
    decode: StepTime
    prefill_load: Load
    ttft_s: float
    tpot_s: float
    tokens_per_s: float
    requests_per_s: float
    request_s: float

    def misses(self, workload: Workload) -> str | None:
        """What it does not deliver; None: nothing."""
        for name in ("ttft_s", "tpot_s"):
            wanted, is_here = getattr(workload, name), getattr(self, name)
            if wanted is not None and is_here > wanted:
                return f"{name} is {is_here:.4g} with {self.num_seqs} sequences at once, and --{name}={wanted:g}"
        if workload.qps is not None and self.requests_per_s < workload.qps:
            return (
                f"serves {self.requests_per_s:.3g} requests/s with {self.num_seqs} at once, and --qps={workload.qps:g}"
            )
        return None


def predict(model: MeshModel, workload: Workload, rows: int, policy: ChunkPolicy, num_steps: int) -> Performance:
    """With `rows` sequences in each data shard, in steps as the scheduler makes them under `policy`.

    A request takes the steps of its prompt, and one for each token but the first, and meanwhile every other request has
    its prompt prefilled once: in steps of its own as long as there are enough of them, else together with others.
    """
    num_shards, later_tokens = model.splits.num_shards(ax.BATCH), workload.output_tokens - 1
    decode = model.step_time(workload.decode_load(rows), num_steps)
    chunks: Mapping[int, float] = _chunks(workload.prompt_tokens, _beside(rows), policy)
    own: float = sum(chunks.values())
    if rows * own > own + later_tokens:
        chunks = _packed_chunks(workload.prompt_tokens, rows, policy, own + later_tokens)
        own = max(1.0, sum(chunks.values()))
    loads = {size: workload.prefill_load(size, rows, policy) for size in chunks}
    num_mixed = sum(chunks.values())  # for each request
    mixed_s = sum(count * model.step_time(loads[size]).total_s for size, count in chunks.items()) / num_mixed
    steps = max(rows * num_mixed, own + later_tokens)
    seconds = rows * num_mixed * mixed_s + (steps - rows * num_mixed) * decode.total_s
    beside_others = min(1.0, (rows - 1) * num_mixed / max(1, steps - own))  # of the steps in which it decodes
    ttft_s, tpot_s = own * mixed_s, decode.total_s + beside_others * (mixed_s - decode.total_s)
    requests_per_s = num_shards * rows / seconds
    return Performance(
        num_seqs=num_shards * rows,
        decode=decode,
        prefill_load=loads[max(loads)],
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        tokens_per_s=requests_per_s * workload.output_tokens,
        requests_per_s=requests_per_s,
        request_s=ttft_s + later_tokens * tpot_s,
    )


def _beside(rows: int) -> int:
    """Those that decode in a step that prefills: an only one does not prefill and decode at once."""
    return rows if rows > 1 else 0


def _chunks(num_tokens: int, num_decoding: int, policy: ChunkPolicy) -> dict[int, int]:
    """Of a prompt that is prefilled alone: how many steps of which sizes."""
    found: collections.Counter[int] = collections.Counter()
    while num_tokens:
        size = policy.num_tokens(num_tokens, num_decoding)
        times = max(1, num_tokens // size - 1)  # those are alike; what is left may be fewer
        found[size] += times
        num_tokens -= times * size
    return found


def _packed_chunks(num_tokens: int, rows: int, policy: ChunkPolicy, steps: float) -> dict[int, float]:
    """Of each of `rows` prompts in about so many steps together: what it has of steps of which sizes.

    Where a step takes less than comes in its time, prompts wait, until one takes as much as it can.
    """
    coming = math.ceil(rows * num_tokens / steps)
    few, most = (
        policy.num_tokens(min(n, num_chunks(rows) * num_tokens), _beside(rows)) for n in (coming, rows * num_tokens)
    )
    share = min(1.0, (coming - few) / (most - few)) if most > few else 1.0  # of steps that take the most
    times = num_tokens / (share * most + (1 - share) * few)
    return {size: times * of_all for size, of_all in ((few, 1 - share), (most, share)) if of_all}


def best_rows(workload: Workload, most: int, performance_of: Callable[[int], Performance]) -> Performance:
    """Of 1 to `most` rows those for the workload, within its limits where that can be.

    For latency the fewest that serve it; else those with the most tokens per second, where beyond some number more
    sequences leave a step less room for prompts. Numbers are tried in steps of an eighth.
    """
    sizes = sorted({*(round(2 ** (n / 6)) for n in range(6 * most.bit_length()) if 2 ** (n / 6) < most), most})
    found = [performance_of(rows) for rows in sizes]
    legal = [performance for performance in found if performance.misses(workload) is None]
    if workload.objective == "latency":
        return min(legal or found, key=lambda performance: performance.request_s)
    return max(legal or found, key=lambda performance: performance.tokens_per_s)
