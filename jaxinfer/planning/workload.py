"""What a plan is asked for, and what a mesh of devices would deliver. Host only."""

import dataclasses
from collections.abc import Callable

from jaxinfer.integers import cdiv
from jaxinfer.planning.loads import Load
from jaxinfer.planning.roofline import MeshModel, StepTime
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

    def chunk_load(self, rows: int, max_num_batched_tokens: int) -> Load:
        """Of a step that prefills a chunk of one of so many requests, while the others decode."""
        chunk = max(1, min(self.prompt_tokens, max_num_batched_tokens - (rows if rows > 1 else 0)))
        decoding = self.decode_load(rows - 1)
        return decoding._replace(chunk_tokens=chunk, chunk_context=self.prompt_tokens / 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Performance:
    """Expected of a mesh on which so many requests are under way.

    Attributes:
      num_seqs: requests at once, over the whole mesh.
      decode: of a step that prefills nothing.
      ttft_s: from the start of a prompt's prefill to its first token, beside the others' decoding; no queue.
      tpot_s: for each further token, with the prompts of others in between.
      tokens_per_s: generated, of all requests.
    """

    num_seqs: int
    decode: StepTime
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


def predict(
    model: MeshModel, workload: Workload, rows: int, max_num_batched_tokens: int, num_steps: int
) -> Performance:
    """With `rows` sequences in each data shard, in steps as the scheduler makes them.

    Each step is a token of every sequence that decodes, and beside them a chunk of a prompt, while one is there: of
    each sequence as many chunks as its prompt has, and a step for each of its output tokens.
    """
    num_shards = model.splits.num_shards(ax.BATCH)
    prefill = workload.chunk_load(rows, max_num_batched_tokens)
    chunk, others = prefill.chunk_tokens, prefill.rows
    num_chunks = cdiv(workload.prompt_tokens, chunk)
    decode = model.step_time(workload.decode_load(rows), num_steps)
    mixed = model.step_time(prefill).total_s
    chunk_steps = rows * workload.prompt_tokens / chunk
    plain_steps = max(0.0, workload.output_tokens - (chunk_steps if others else 0))
    seconds = chunk_steps * mixed + plain_steps * decode.total_s
    ttft_s = num_chunks * mixed
    tpot_s = seconds / workload.output_tokens if others else decode.total_s
    requests_per_s = num_shards * rows / seconds
    return Performance(
        num_seqs=num_shards * rows,
        decode=decode,
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        tokens_per_s=requests_per_s * workload.output_tokens,
        requests_per_s=requests_per_s,
        request_s=ttft_s + (workload.output_tokens - 1) * tpot_s,
    )


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
