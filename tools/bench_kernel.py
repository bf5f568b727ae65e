"""Times paged attention beside what the same device copies and multiplies, in the same run.

    python tools/bench_kernel.py
    python tools/bench_kernel.py --decode=64x8192,zipf64x8192 --prefill= --page_size=64
    python tools/bench_kernel.py --decode=2x64 --prefill=1x32 --backends=xla,triton --quick     # on a CPU: the logic

Decoding: `64x8192` are 64 rows of 8,192 cached tokens, of `zipf64x8192` the n-th longest has one n-th of the longest.
Its share is of the bytes that copying moves in a second, reading and writing, as keys and values of all tokens are
read once. Prefill: `2x8192` are two prompts of 8,192 new tokens; operations are those of the causal half. Its share is
of a large matrix product's. Peers are what is installed: JAX's own paged kernel, and cuDNN through JAX over a cache
that is not in pages. Errors are of the first row or prompt against NumPy in float64, relative to its largest number.
"""

import dataclasses
import functools
import importlib.util
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from jaxinfer.engine_config import KV_CACHE_DTYPES
from jaxinfer.integers import cdiv
from jaxinfer.tools import kernel_peers
from jaxinfer.tools.bench_record import describe_run, print_record
from jaxinfer.tools.kernel_timing import Operation, Timer, copy_timer, matmul_timer, medians
from pallas_kernels.paged_attention import AttentionSpec, backend, backends
from pallas_kernels.paged_attention.pages import Pages, quantize, values_and_scales

_DECODE = flags.DEFINE_list("decode", ["1x16384", "8x8192", "64x8192", "256x2048", "zipf64x32768"], "Rows x tokens.")
_PREFILL = flags.DEFINE_list("prefill", ["1x16384", "8x2048"], "Prompts x new tokens.")
_BACKENDS = flags.DEFINE_list("backends", None, "In pallas_kernels/paged_attention/; all that can by default.")
_HEADS = flags.DEFINE_list("heads", ["32", "8", "128"], "Query heads, KV heads, numbers of a head.")
_PAGE_SIZE = flags.DEFINE_integer("page_size", 64, "Tokens per page.", lower_bound=1)
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of queries and cache.")
_CACHE_DTYPE = flags.DEFINE_enum("kv_cache_dtype", "auto", [*KV_CACHE_DTYPES], "Quantises the cache to 8 bits.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 20, "Calls in a round.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "One round of two calls, and ceilings of small arrays.")

_COPY_BYTES, _MATMUL_SIZE = 2**30, 8192
_TURNS = 2  # caches that take turns, so that none is still near the cores when it is read again


def main(_: list[str]) -> None:
    num_q_heads, num_kv_heads, head_dim = map(int, _HEADS.value)
    spec = AttentionSpec(
        num_q_heads=num_q_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        page_size=_PAGE_SIZE.value,
        scale=head_dim**-0.5,
        cache_dtype=KV_CACHE_DTYPES[_CACHE_DTYPE.value],
    )
    copied, size = (2**20, 128) if _QUICK.value else (_COPY_BYTES, _MATMUL_SIZE)
    ceilings = measure({"copy": copy_timer(copied, calls()), "matmul": matmul_timer(size, calls())})
    record = {"copy_bytes_per_s": 2 * copied / ceilings["copy"], "matmul_flops_per_s": 2 * size**3 / ceilings["matmul"]}
    copies, multiplies = record["copy_bytes_per_s"] / 1e9, record["matmul_flops_per_s"] / 1e12
    print(f"copies {copies:.1f} GB/s, multiplies {multiplies:.2f} TFLOP/s", flush=True)
    results = []
    for text in _DECODE.value:
        work = Work.of_rows(spec, lengths_of(text))
        results.append(report(text, "decode", work, work.bytes_read, record["copy_bytes_per_s"]))
    for text in _PREFILL.value:
        work = Work.of_prompts(spec, lengths_of(text))
        results.append(report(text, "prefill", work, work.operations, record["matmul_flops_per_s"]))
    packages = [name for name in ("torch", "triton") if importlib.util.find_spec(name)]
    print_record(describe_run("bench_kernel", packages) | record | {"results": results})


def calls() -> int:
    return 2 if _QUICK.value else _CALLS.value


def measure(timers: dict[str, Timer]) -> dict[str, float]:
    return medians(timers, 1 if _QUICK.value else _ROUNDS.value)


def lengths_of(text: str) -> list[int]:
    """ "2x8" -> [8, 8], "zipf3x9" -> [9, 4, 3]"""
    match = re.fullmatch(r"(zipf)?(\d+)x(\d+)", text)
    if match is None:
        raise app.UsageError(f"{text}: not rows x tokens, such as 64x8192 or zipf64x8192")
    rows, longest = int(match[2]), int(match[3])
    return [max(1, longest // (n + 1)) if match[1] else longest for n in range(rows)]


@dataclasses.dataclass(frozen=True)
class Work:
    """What is attended over.

    Attributes:
      q: [B, 1, N, H] of rows, [S, N, H] of prompts.
      lengths: cached tokens of each sequence, its new ones included.
      turns: (keys, values, block tables) each; pages lie anywhere.
    """

    spec: AttentionSpec
    q: jax.Array
    lengths: list[int]
    turns: list[tuple[Pages, Pages, jax.Array]]

    @classmethod
    def of_rows(cls, spec: AttentionSpec, lengths: list[int]) -> "Work":
        return cls._create(spec, lengths, (len(lengths), 1))

    @classmethod
    def of_prompts(cls, spec: AttentionSpec, lengths: list[int]) -> "Work":
        return cls._create(spec, lengths, (sum(lengths),))

    @classmethod
    def _create(cls, spec: AttentionSpec, lengths: list[int], of_q: tuple[int, ...]) -> "Work":
        pages = [cdiv(length, spec.page_size) for length in lengths]
        rng = np.random.default_rng(0)
        turns = []
        for turn in range(_TURNS):
            keys = jax.random.split(jax.random.key(turn), 2)
            shape = (1 + sum(pages), spec.num_kv_heads, spec.page_size, spec.head_dim)
            k_pages, v_pages = (jax.random.normal(key, shape, _DTYPE.value) for key in keys)
            tables, free = np.zeros((len(pages), max(pages)), np.int32), iter(rng.permutation(sum(pages)) + 1)
            for row, count in enumerate(pages):
                tables[row, :count] = [next(free) for _ in range(count)]
            if spec.cache_dtype is not None:
                of_pages = jax.jit(functools.partial(quantize, dtype=spec.cache_dtype))
                k_pages, v_pages = map(of_pages, (k_pages, v_pages))
            turns.append((k_pages, v_pages, jnp.array(tables)))
        q = jax.random.normal(jax.random.key(_TURNS), (*of_q, spec.num_q_heads, spec.head_dim), _DTYPE.value)
        return cls(spec, q, lengths, turns)

    @property
    def bytes_read(self) -> int:
        return sum(self.lengths) * self.spec.token_bytes(self.q.dtype.itemsize)

    @property
    def operations(self) -> int:
        """Of both products, where a token meets itself and those before it."""
        pairs = sum(length * (length + 1) // 2 for length in self.lengths)
        return 4 * pairs * self.spec.num_q_heads * self.spec.head_dim

    def ours(self, name: str) -> Operation:
        module, lengths = backend(name, self.spec), jnp.array(self.lengths, jnp.int32)
        if self.q.ndim == 4:
            return lambda q, turn: module.paged_attention(q, *turn, lengths[:, None] - 1, spec=self.spec)
        starts = jnp.zeros_like(lengths)
        return lambda q, turn: module.ragged_paged_attention(q, *turn, starts, lengths, spec=self.spec)

    def expected(self) -> np.ndarray:
        """Of the first sequence's last token, [N, H], in float64."""
        *pools, tables = self.turns[0]
        k_pages, v_pages = map(numbers, pools)
        length, last = self.lengths[0], self.q[0, 0] if self.q.ndim == 4 else self.q[self.lengths[0] - 1]
        of_kv_head = np.asarray(last, np.float64).reshape(self.spec.num_kv_heads, -1, self.spec.head_dim)
        keys, values = (
            pages[np.asarray(tables[0])].swapaxes(1, 2).reshape(-1, *pages.shape[1::2])[:length]
            for pages in (k_pages, v_pages)
        )
        scores = np.einsum("kgh,skh->kgs", of_kv_head, keys) * self.spec.scale
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        out = np.einsum("kgs,skh->kgh", weights / weights.sum(axis=-1, keepdims=True), values)
        return out.reshape(self.spec.num_q_heads, -1)

    def error(self, operation: Operation, turn: Any) -> float:
        """Largest, relative to the largest number."""
        out = jax.jit(operation)(self.q, turn)
        out = np.asarray(out[0, 0] if self.q.ndim == 4 else out[self.lengths[0] - 1], np.float64)
        expected = self.expected()
        return float(np.abs(out - expected).max() / np.abs(expected).max())


def numbers(pages: Pages) -> np.ndarray:
    """In float64."""
    values, scales = values_and_scales(pages)
    values = np.asarray(values, np.float64)
    return values if scales is None else values * np.asarray(scales, np.float64)[..., None]


def report(text: str, kind: str, work: Work, amount: int, ceiling: float) -> dict[str, Any]:
    """Of one case: every backend and peer that can, timed by turns."""
    names = _BACKENDS.value or [name for name in backends() if not backend(name).unsupported(work.spec)]
    all_ways = {name: (work.ours(name), work.turns) for name in names}
    all_ways |= kernel_peers.find(work.spec, kind == "decode", work.lengths, work.turns)
    timers = {name: Timer(operation, work.q, turns, calls()) for name, (operation, turns) in all_ways.items()}
    rows = {}
    for name, seconds in measure(timers).items():
        operation, turns = all_ways[name]
        rate, error = amount / seconds, work.error(operation, turns[0])
        rows[name] = {"seconds": seconds, "per_s": rate, "share": rate / ceiling, "error": error}
        unit = f"{rate / 1e9:.1f} GB/s" if kind == "decode" else f"{rate / 1e12:.2f} TFLOP/s"
        print(f"{kind} {text} {name}: {seconds * 1e6:.1f} us, {unit}, {rate / ceiling:.1%}, error {error:.1e}")
    return {"kind": kind, "case": text, "amount": amount, **rows}


if __name__ == "__main__":
    app.run(main)
