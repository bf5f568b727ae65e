"""Who the benchmarks compare with, in the same run: the same weights and prompts, decoded greedily.

    hf            Hugging Face transformers, eager, with its growing cache
    hf_compiled   transformers with a static cache, its decode step compiled by torch.compile
    llama_cpp     llama.cpp by way of llama-cpp-python, its weights written to GGUF here; on CPUs

Each is imported when it is asked for: pip install -e ".[bench]" brings what it can, torch is best installed as its own
page says. On a busy machine torch can be several times faster with one thread than with its own choice, so a peer runs
with several numbers of threads and whichever is best counts.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import pathlib
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np


class Generated(NamedTuple):
    """New tokens of each sequence, the seconds until each had its first, and those for all others."""

    tokens: list[list[int]]
    prefill_s: float
    decode_s: float


Generate = Callable[[list[list[int]]], Generated]  # of prompts that are all as long


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a peer generates with.

    Attributes:
      model_dir: config.json and safetensors, in `dtype`.
      dtype: a name: float32, bfloat16, float16.
      batch_size: prompts at once.
      prompt_tokens: of each.
      new_tokens: of each, after the first.
    """

    model_dir: pathlib.Path
    dtype: str
    batch_size: int
    prompt_tokens: int
    new_tokens: int


class _Peer(NamedTuple):
    module: str  # beside this one, with a function `make` of a Setting, the peer's name and a number of threads
    packages: tuple[str, ...]  # that it imports, as they are called in Python and where they are installed from


_TORCH = _Peer("bench_peer_torch", ("torch", "transformers"))
PEERS = {"hf": _TORCH, "hf_compiled": _TORCH, "llama_cpp": _Peer("bench_peer_llama_cpp", ("llama_cpp", "gguf"))}


def check(names: Iterable[str]) -> None:
    """Raises ValueError for peers that nobody knows or that are not installed."""
    names = [*names]
    if unknown := sorted({*names} - {*PEERS}):
        raise ValueError(f"unknown {', '.join(unknown)}; known: {', '.join(PEERS)}")
    missing = {name: [p for p in PEERS[name].packages if importlib.util.find_spec(p) is None] for name in names}
    if told := [f"{name} needs {' and '.join(packages)}" for name, packages in missing.items() if packages]:
        raise ValueError(f'{"; ".join(told)}: pip install -e ".[bench]", and torch as its own page says')


def packages(names: Iterable[str]) -> tuple[str, ...]:
    """Whose versions decide how fast these peers are, as they are installed."""
    found = dict.fromkeys(package for name in names for package in PEERS[name].packages)
    return tuple(package.replace("llama_cpp", "llama-cpp-python") for package in found)


def make(names: Iterable[str], setting: Setting, threads: Iterable[int]) -> Iterator[tuple[str, int, Generate]]:
    """Each peer with each number of threads, 0 being its own choice."""
    for name, number in itertools.product(names, threads):
        module = importlib.import_module(f"jaxinfer.tools.{PEERS[name].module}")
        yield name, number, module.make(setting, name, number)


def count_equal(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Tokens before the first difference of each sequence: after it the two read different texts."""
    firsts = [np.flatnonzero(np.array(a) != np.array(b)) for a, b in zip(ours, theirs, strict=True)]
    return sum(int(first[0]) if len(first) else len(row) for first, row in zip(firsts, ours, strict=True))
