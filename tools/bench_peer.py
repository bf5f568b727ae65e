"""The peer of the benchmarks: Hugging Face transformers, run eagerly, on the device that jax uses. Needs torch."""

import functools
import pathlib
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

# Prompts, all of one length -> each sequence's new tokens, and the seconds it took to decode all but the first.
Generate = Callable[[list[list[int]]], tuple[list[list[int]], float]]

PACKAGES = ("torch", "transformers")


def load(model_dir: pathlib.Path, dtype: str) -> Any:
    """The transformers model, ready to run."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    return model.to(torch.device(device)).eval()  # pyright: ignore[reportArgumentType]


def make_peer(model_dir: pathlib.Path, dtype: str, new_tokens: int) -> Callable[[int], Generate]:
    """Greedy decoding of `new_tokens` after the first; takes the number of threads, 0 for torch's own choice."""
    import torch
    import transformers

    own_choice = torch.get_num_threads()
    model = load(model_dir, dtype)

    @torch.inference_mode()
    def generate(num_threads: int, prompts: list[list[int]]) -> tuple[list[list[int]], float]:
        torch.set_num_threads(num_threads or own_choice)
        cache = transformers.DynamicCache(config=model.config)
        step = functools.partial(model, past_key_values=cache, use_cache=True, logits_to_keep=1)
        token = step(torch.tensor(prompts, device=model.device)).logits[:, -1:].argmax(-1)
        tokens = [token.tolist()]  # to the host, so that prefill is over
        start = time.perf_counter()
        for _ in range(new_tokens):
            token = step(token).logits[:, -1:].argmax(-1)
            tokens.append(token.tolist())
        elapsed_s = time.perf_counter() - start
        return np.concatenate(tokens, axis=1).tolist(), elapsed_s

    return lambda num_threads: functools.partial(generate, num_threads)


def count_equal(ours: list[list[int]], theirs: list[list[int]]) -> int:
    """Tokens before the first difference of each sequence: after it the two read different texts."""
    firsts = [np.flatnonzero(np.array(a) != np.array(b)) for a, b in zip(ours, theirs, strict=True)]
    return sum(int(first[0]) if len(first) else len(row) for first, row in zip(firsts, ours, strict=True))
