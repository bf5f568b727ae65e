"""Times paged attention beside what the same device copies and multiplies, in the same run.

    python tools/bench_kernel.py
    python tools/bench_kernel.py --decode=64x8192,zipf64x8192 --prefill= --page_size=64
    python tools/bench_kernel.py --decode=2x64 --prefill=1x32 --backends=xla,triton --quick     # on a CPU: the logic

Decoding: `64x8192` are 64 rows of 8,192 cached tokens, of `zipf64x8192` the n-th longest has one n-th of the longest.
Its share is of the bytes that copying moves in a second, reading and writing, as keys and values of all tokens are
read once; beside it stands what writing the rows' new keys and values takes. Prefill: `2x8192` are two prompts of 8,192
new tokens; operations are those of the causal half. Its share is of a large matrix product's. Peers are what is
installed: JAX's own paged kernel, and cuDNN through JAX over a cache that is not in pages. A backend that would need
more than 16 GiB for a case, as xla does for long prompts, is left out of it, unless --backends names it. Errors are of
the first row or prompt against NumPy in float64, relative to its largest number.
"""

import importlib.util
from typing import Any

from absl import app, flags

from jaxinfer.tools import kernel_flags, kernel_peers
from jaxinfer.tools.bench_record import describe_run, print_record
from jaxinfer.tools.kernel_timing import measure_ceilings, medians, timers_that_can
from jaxinfer.tools.kernel_work import Work, lengths_of

_DECODE = flags.DEFINE_list("decode", ["1x16384", "8x8192", "64x8192", "256x2048", "zipf64x32768"], "Rows x tokens.")
_PREFILL = flags.DEFINE_list("prefill", ["1x16384", "8x2048"], "Prompts x new tokens.")
_BACKENDS = flags.DEFINE_list("backends", None, "In pallas_kernels/paged_attention/; all that can by default.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 20, "Calls in a round.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "One round of two calls, and ceilings of small arrays.")


def main(_: list[str]) -> None:
    spec = kernel_flags.spec()
    record = measure_ceilings(calls(), rounds(), is_quick=_QUICK.value)
    results = []
    for text in _DECODE.value:
        work = Work.of_rows(spec, lengths_of(text), kernel_flags.DTYPE.value)
        results.append(report(text, "decode", work, work.bytes_read, record["copy_bytes_per_s"]))
    for text in _PREFILL.value:
        work = Work.of_prompts(spec, lengths_of(text), kernel_flags.DTYPE.value)
        results.append(report(text, "prefill", work, work.operations, record["matmul_flops_per_s"]))
    packages = [name for name in ("torch", "triton") if importlib.util.find_spec(name)]
    print_record(describe_run("bench_kernel", packages) | record | {"results": results})


def calls() -> int:
    return 2 if _QUICK.value else _CALLS.value


def rounds() -> int:
    return 1 if _QUICK.value else _ROUNDS.value


def report(text: str, kind: str, work: Work, amount: int, ceiling: float) -> dict[str, Any]:
    """Of one case: every backend and peer that can, timed by turns."""
    ours = {name: (work.ours(name), work.turns) for name in _BACKENDS.value or work.backends()}
    peers = kernel_peers.find(work.spec, kind == "decode", work.lengths, work.turns)
    timers, rows = timers_that_can({**ours, **peers}, work.q, calls())
    for name, seconds in medians(timers, rounds()).items():
        rate, error = amount / seconds, work.error(timers[name].result)
        rows[name] = {"seconds": seconds, "per_s": rate, "share": rate / ceiling, "error": error}
        unit = f"{rate / 1e9:.1f} GB/s" if kind == "decode" else f"{rate / 1e12:.2f} TFLOP/s"
        print(f"{kind} {text} {name}: {seconds * 1e6:.1f} us, {unit}, {rate / ceiling:.1%}, error {error:.1e}")
    if kind == "decode":
        rows["cache_write"] = {"seconds": medians({"write": work.write_timer(calls())}, rounds())["write"]}
        print(f"{kind} {text} cache write: {rows['cache_write']['seconds'] * 1e6:.1f} us")
    return {"kind": kind, "case": text, "amount": amount, **rows}


if __name__ == "__main__":
    app.run(main)
