"""Finds fast settings of the Triton kernel for the device that is here, and keeps them in pallas_kernels/tuning/.

    python tools/tune_kernel.py                                        # on a GPU; --seconds for each kind of step
    python tools/tune_kernel.py --heads=64,8,64 --decode=64x4096       # for other heads
    python tools/tune_kernel.py --quick --folder=/tmp/tuning           # on a CPU: the logic

From the settings in force one is moved a step up or down at a time. What is then faster over all cases, by the
geometric mean of the ratios of medians of alternating rounds, is gone on from, until nothing is, or the time is over.
Settings that do not compile, for want of shared memory say, or whose result is less exact, are passed over.
"""

import dataclasses
import pathlib
import time
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from jaxinfer.tools import kernel_flags
from jaxinfer.tools.bench_record import describe_run, print_record
from jaxinfer.tools.kernel_search import LADDERS, Speedup, keep, search
from jaxinfer.tools.kernel_work import Work, lengths_of
from pallas_kernels import tuning
from pallas_kernels.paged_attention import AttentionSpec, triton_tuning

_DECODE = flags.DEFINE_list("decode", ["8x8192", "64x4096", "zipf64x16384"], "Rows x tokens.")
_PREFILL = flags.DEFINE_list("prefill", ["1x8192", "8x1024"], "Prompts x new tokens.")
_SECONDS = flags.DEFINE_float("seconds", 200, "For decoding, and as many for prefill.", lower_bound=0)
_FOLDER = flags.DEFINE_string("folder", str(tuning.FOLDER), "Where to keep what is found.")
_QUICK = flags.DEFINE_bool("quick", False, "One setting moves, one step.")

_QUICK_LADDERS = {"block_tokens": (32,)}
_ROUNDS, _CALLS = 5, 10


def tune(spec: AttentionSpec, kind: str, cases: dict[str, Work]) -> dict[str, Any]:
    """The entry of what is found."""
    rounds, num_calls = (1, 1) if _QUICK.value else (_ROUNDS, _CALLS)
    speedup, end = Speedup(cases, rounds, num_calls), time.monotonic() + _SECONDS.value
    itemsize = jnp.dtype(kernel_flags.DTYPE.value).itemsize
    start = triton_tuning.tuning_of(spec, kind, itemsize)
    best = search(start, _QUICK_LADDERS if _QUICK.value else LADDERS, speedup, lambda: time.monotonic() > end)
    ratio = speedup(start, best)
    print(f"{kind}: {ratio:.3f} times as fast with {best}", flush=True)
    return {
        "kernel": triton_tuning.kernel(kind),
        "for": triton_tuning.tuned_for(spec, itemsize),
        "settings": dataclasses.asdict(best),
        "record": {"speedup": ratio, "cases": [*cases]} | describe_run("tune_kernel"),
    }


def main(_: list[str]) -> None:
    spec = kernel_flags.spec()
    path, found = pathlib.Path(_FOLDER.value) / tuning.file_name(jax.devices()[0].device_kind), []
    for kind, texts, make in (("decode", _DECODE, Work.of_rows), ("prefill", _PREFILL, Work.of_prompts)):
        if texts.value:
            cases = {text: make(spec, lengths_of(text), kernel_flags.DTYPE.value) for text in texts.value}
            found.append(tune(spec, kind, cases))
            keep(path, found[-1])
    print_record(describe_run("tune_kernel") | {"file": str(path), "results": found})


if __name__ == "__main__":
    app.run(main)
