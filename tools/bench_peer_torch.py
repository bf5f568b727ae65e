"""Hugging Face transformers as a peer, eager or compiled, on the device that jax uses."""

import functools
import pathlib
import time
from typing import Any

import jax
import numpy as np
import torch
import transformers

from jaxinfer.tools.bench_peer import Generate, Generated, Setting

_OWN_THREADS = torch.get_num_threads()


@functools.lru_cache(maxsize=1)
def load(model_dir: pathlib.Path, dtype: str) -> Any:
    """The model, ready to run; the last one is kept."""
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
    device = "cpu" if jax.default_backend() == "cpu" else "cuda"
    return model.to(torch.device(device)).eval()  # pyright: ignore[reportArgumentType]


def make(setting: Setting, name: str, num_threads: int) -> Generate:
    """Both prefill eagerly; what is compiled is the step, with a cache as long as it gets."""
    model, is_compiled = load(setting.model_dir, setting.dtype), name == "hf_compiled"
    cache, step = None, model
    if is_compiled:
        tokens = setting.prompt_tokens + setting.new_tokens
        cache = transformers.StaticCache(config=model.config, max_cache_len=tokens)
        torch._dynamo.reset()  # or it would compile the next setting for any shape
        mode = "default" if model.device.type == "cpu" else "reduce-overhead"
        step = torch.compile(model, mode=mode, fullgraph=True, dynamic=False)

    @torch.inference_mode()
    def generate(prompts: list[list[int]]) -> Generated:
        torch.set_num_threads(num_threads or _OWN_THREADS)
        if cache is not None:
            cache.reset()
        given = {"past_key_values": cache or transformers.DynamicCache(config=model.config), "use_cache": True}
        start = time.perf_counter()
        token = model(torch.tensor(prompts, device=model.device), logits_to_keep=1, **given).logits[:, -1:].argmax(-1)
        tokens = [token.tolist()]  # to the host, so that prefill is over
        first = time.perf_counter()
        for _ in range(setting.new_tokens):
            token = step(token, **given).logits.argmax(-1)
            tokens.append(token.tolist())
        end = time.perf_counter()
        return Generated(np.concatenate(tokens, axis=1).tolist(), first - start, end - first)

    return generate
