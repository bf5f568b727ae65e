"""Times experts' products beside what the same device copies and multiplies, in the same run.

    python tools/bench_grouped.py
    python tools/bench_grouped.py --experts=8,2,4096,14336 --tokens=1,64,2048
    python tools/bench_grouped.py --experts=4,2,32,48 --tokens=3,20 --quick                     # on a CPU: the logic

Experts are gated MLPs, their number, those of a token, and the numbers of a token and of a hidden unit as `--experts`
says: by default those of Qwen3-30B-A3B, and of Mixtral in the second line. Tokens pick theirs at random. One share is
of the bytes that copying moves in a second, as the weights of every expert that is picked are read once; the other is
of a large matrix product's operations. The larger of the two says what a case is bound by. The peer is
`jax.lax.ragged_dot`, with its weights transposed before. Errors are of the first and last rows against NumPy in
float64, relative to its largest number.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from jax import lax

from jaxinfer.tools.bench_record import describe_run, print_record
from jaxinfer.tools.kernel_timing import Operation, Ways, measure_ceilings, medians, timers_that_can
from pallas_kernels.grouped_matmul import Product, backend, backends

_EXPERTS = flags.DEFINE_list("experts", ["128", "8", "2048", "768"], "Number, of a token, embed_dim, mlp_dim.")
_TOKENS = flags.DEFINE_list("tokens", ["1", "8", "64", "256", "2048", "8192"], "Of each case.")
_BACKENDS = flags.DEFINE_list("backends", None, "In pallas_kernels/grouped_matmul/; all that can by default.")
_PEER = flags.DEFINE_bool("peer", True, "Also `jax.lax.ragged_dot`.")
_DTYPE = flags.DEFINE_enum("dtype", "bfloat16", ["bfloat16", "float16", "float32"], "Of rows and weights.")
_ROUNDS = flags.DEFINE_integer("rounds", 7, "Timed rounds of each.", lower_bound=1)
_CALLS = flags.DEFINE_integer("calls", 20, "Calls in a round.", lower_bound=1)
_QUICK = flags.DEFINE_bool("quick", False, "One round of two calls, and ceilings of small arrays.")

_TURNS = 2  # weights that take turns, so that none are still near the cores when they are read again

Params = dict[str, jax.Array]


def main(_: list[str]) -> None:
    num_experts, per_token, embed_dim, mlp_dim = map(int, _EXPERTS.value)
    experts = Experts.create(num_experts, embed_dim, mlp_dim)
    record = measure_ceilings(calls(), rounds(), is_quick=_QUICK.value)
    results = [report(Work.create(experts, int(tokens), per_token), record) for tokens in _TOKENS.value]
    print_record(describe_run("bench_grouped") | record | {"results": results})


def calls() -> int:
    return 2 if _QUICK.value else _CALLS.value


def rounds() -> int:
    return 1 if _QUICK.value else _ROUNDS.value


@dataclasses.dataclass(frozen=True)
class Experts:
    """Weights that take turns: gate and up [G, F, D], down [G, D, F]; and of each the transposed."""

    turns: list[Params]
    transposed: list[Params]

    @classmethod
    def create(cls, num_experts: int, embed_dim: int, mlp_dim: int) -> "Experts":
        shapes = {"gate": (mlp_dim, embed_dim), "up": (mlp_dim, embed_dim), "down": (embed_dim, mlp_dim)}

        def make(seed: int) -> Params:
            keys = jax.random.split(jax.random.key(seed), len(shapes))
            return {
                name: jax.random.normal(key, (num_experts, *shape), _DTYPE.value) * shape[1] ** -0.5
                for key, (name, shape) in zip(keys, shapes.items(), strict=True)
            }

        turns = [make(turn) for turn in range(_TURNS)]
        transpose = jax.jit(lambda turn: jax.tree.map(lambda weight: weight.swapaxes(1, 2), turn))
        return cls(turns, [*map(transpose, turns)] if _PEER.value else [])


def gated(product: Product, params: Params, x: jax.Array) -> jax.Array:
    return product(jax.nn.silu(product(x, params["gate"])) * product(x, params["up"]), params["down"])


@dataclasses.dataclass(frozen=True)
class Work:
    """What is multiplied.

    Attributes:
      x: [R, D], sorted by expert.
      sizes: int32 [G], rows of each expert.
    """

    num_tokens: int
    experts: Experts
    x: jax.Array
    sizes: np.ndarray

    @classmethod
    def create(cls, experts: Experts, num_tokens: int, per_token: int) -> "Work":
        num_experts, _, embed_dim = experts.turns[0]["gate"].shape
        rng = np.random.default_rng(0)
        picked = np.argsort(rng.random((num_tokens, num_experts)), axis=1)[:, :per_token]
        x = jax.random.normal(jax.random.key(_TURNS), (picked.size, embed_dim), _DTYPE.value)
        return cls(num_tokens, experts, x, np.bincount(picked.ravel(), minlength=num_experts).astype(np.int32))

    @property
    def num_used(self) -> int:
        """Experts that have rows."""
        return int(np.count_nonzero(self.sizes))

    @property
    def bytes_read(self) -> int:
        """Weights of the experts that have rows."""
        return self.num_used * self._expert_numbers * self.x.dtype.itemsize

    @property
    def operations(self) -> int:
        return 2 * len(self.x) * self._expert_numbers

    @property
    def _expert_numbers(self) -> int:
        """Of its weights."""
        return sum(math.prod(weight.shape[1:]) for weight in self.experts.turns[0].values())

    def ways(self) -> Ways:
        """By name, every backend and the peer, and the weights that each takes."""
        sizes = jnp.asarray(self.sizes)
        smallest = min(self.experts.turns[0]["gate"].shape[1:])
        names = _BACKENDS.value or [
            name for name in backends() if not backend(name).unsupported(smallest, jax.devices()[0])
        ]
        found = {name: (self._ours(name, sizes), self.experts.turns) for name in names}

        def ragged(x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
            assert bias is None
            return lax.ragged_dot(x, weight, sizes)

        peer = {"jax.lax.ragged_dot": (lambda x, turn: gated(ragged, turn, x), self.experts.transposed)}
        return {**found, **(peer if _PEER.value else {})}

    @staticmethod
    def _ours(name: str, sizes: jax.Array) -> Operation:
        return lambda x, turn: backend(name).grouped_map(gated, turn, x, sizes)

    def error(self, out: jax.Array) -> float:
        """Largest of the first and last rows, relative to the largest number, of what the first turn computed."""
        ends, groups = [0, -1], np.flatnonzero(self.sizes)[[0, -1]]
        last = np.asarray(out[jnp.array(ends)], np.float64)
        x = np.asarray(self.x[jnp.array(ends)], np.float64)
        one = {name: np.asarray(weight[groups], np.float64) for name, weight in self.experts.turns[0].items()}
        gate, up = (np.einsum("ri,roi->ro", x, one[name]) for name in ("gate", "up"))
        expected = np.einsum("ri,roi->ro", gate / (1 + np.exp(-gate)) * up, one["down"])
        return float(np.abs(last - expected).max() / np.abs(expected).max())


def report(work: Work, ceilings: dict[str, float]) -> dict[str, Any]:
    """Of one case: every backend and the peer, timed by turns."""
    timers, rows = timers_that_can(work.ways(), work.x, calls())
    for name, seconds in medians(timers, rounds()).items():
        reads, multiplies = work.bytes_read / seconds, work.operations / seconds
        shares = reads / ceilings["copy_bytes_per_s"], multiplies / ceilings["matmul_flops_per_s"]
        error = work.error(timers[name].result)
        rows[name] = {"seconds": seconds, "bytes_per_s": reads, "flops_per_s": multiplies, "error": error}
        rows[name] |= {"share_of_copy": shares[0], "share_of_matmul": shares[1]}
        print(
            f"{work.num_tokens} tokens {name}: {seconds * 1e6:.1f} us, {reads / 1e9:.1f} GB/s, {shares[0]:.1%}, "
            f"{multiplies / 1e12:.2f} TFLOP/s, {shares[1]:.1%}, error {error:.1e}",
            flush=True,
        )
    case = {"tokens": work.num_tokens, "rows": len(work.x), "experts_used": work.num_used, "bytes": work.bytes_read}
    return case | rows


if __name__ == "__main__":
    app.run(main)
