"""What an engine tells about itself: one immutable snapshot, also in Prometheus' text format. Host only."""

import dataclasses
from collections.abc import Iterator, Mapping
from itertools import accumulate

from jaxinfer.request_stats import BUCKETS_S, Histogram

_PREFIX = "jaxinfer_"
# Of each attribute of EngineMetrics: Prometheus' type and name for it, and what it is.
_SERIES = {
    "num_running": ("gauge", "num_requests_running", "Requests that hold a slot."),
    "num_waiting": ("gauge", "num_requests_waiting", "Requests in the queue, the preempted ones included."),
    "kv_cache_usage": ("gauge", "kv_cache_usage_ratio", "Share of the cache pages that requests hold."),
    "prefix_cache_hit_rate": ("gauge", "prefix_cache_hit_ratio", "Cached prompt tokens over prompt tokens."),
    "num_steps": ("counter", "engine_steps_total", "Steps run on the devices."),
    "num_preemptions": ("counter", "preemptions_total", "Times that a request gave up its pages."),
    "num_compilations_after_ready": (
        "counter",
        "compilations_after_ready_total",
        "Programs that the process compiled after the engine was ready.",
    ),
    "prompt_tokens": ("counter", "prompt_tokens_total", "Prompt tokens of requests that were started."),
    "cached_prompt_tokens": ("counter", "cached_prompt_tokens_total", "Those found in the prefix cache."),
    "generation_tokens": ("counter", "generation_tokens_total", "Tokens generated."),
    "finished": ("counter", "requests_finished_total", "Requests that ended, by reason."),
    "expert_tokens": ("counter", "expert_tokens_total", "Tokens that an expert got, by layer, if they are counted."),
    "queue_s": ("histogram", "request_queue_time_seconds", "From arrival to the first prefill."),
    "ttft_s": ("histogram", "time_to_first_token_seconds", "From arrival to the first token."),
    "tpot_s": ("histogram", "time_per_output_token_seconds", "Per token after the first."),
    "e2e_s": ("histogram", "e2e_request_latency_seconds", "From arrival to the end."),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineMetrics:
    """An engine at one moment; what each number is, stands in `_SERIES`. Counts are since the engine was made.

    The histograms are of requests that came to their own end. `expert_tokens` has those of each expert by layer.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    num_steps: int
    num_preemptions: int
    num_compilations_after_ready: int
    prompt_tokens: int
    cached_prompt_tokens: int
    generation_tokens: int
    finished: Mapping[str, int]
    expert_tokens: Mapping[int, tuple[int, ...]]
    queue_s: Histogram
    ttft_s: Histogram
    tpot_s: Histogram
    e2e_s: Histogram

    @property
    def prefix_cache_hit_rate(self) -> float:
        """Share of the prompt tokens that were cached; 0 before there are any."""
        return self.cached_prompt_tokens / self.prompt_tokens if self.prompt_tokens else 0.0

    def prometheus_text(self, model_name: str | None = None) -> str:
        """Prometheus' text format; `model_name` becomes a label of every sample."""
        labels = {} if model_name is None else {"model_name": model_name}
        lines: list[str] = []
        for attribute, (kind, name, text) in _SERIES.items():
            lines += [f"# HELP {_PREFIX}{name} {text}", f"# TYPE {_PREFIX}{name} {kind}"]
            lines += _samples(_PREFIX + name, getattr(self, attribute), labels)
        return "\n".join(lines) + "\n"


_Value = float | Histogram | Mapping[str, int] | Mapping[int, tuple[int, ...]]


def _samples(name: str, value: _Value, labels: dict[str, str]) -> Iterator[str]:
    if isinstance(value, Histogram):
        for bound, count in zip((*BUCKETS_S, "+Inf"), accumulate(value.counts), strict=True):
            yield f"{name}_bucket{_labels(labels | {'le': str(bound)})} {count}"
        yield f"{name}_sum{_labels(labels)} {value.sum}"
        yield f"{name}_count{_labels(labels)} {value.count}"
    elif isinstance(value, Mapping):
        for key, count in value.items():
            if isinstance(count, tuple):
                for expert, of_expert in enumerate(count):
                    yield f"{name}{_labels(labels | {'layer': str(key), 'expert': str(expert)})} {of_expert}"
            else:
                yield f"{name}{_labels(labels | {'reason': str(key)})} {count}"
    else:
        yield f"{name}{_labels(labels)} {value}"


def _labels(labels: Mapping[str, str]) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escape(value)}"' for name, value in labels.items()) + "}"


def _escape(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
