"""llama.cpp as a peer, by the C functions that llama-cpp-python binds: its class decodes one sequence at a time."""

import ctypes
import functools
import os
import pathlib
import tempfile
import time
from typing import Any

import llama_cpp  # pyright: ignore[reportMissingImports]
import numpy as np

from jaxinfer.tools.bench_gguf import write_llama
from jaxinfer.tools.bench_peer import Generate, Generated, Setting

_BATCH_TOKENS = 512
_CACHE_TYPES = {"float32": llama_cpp.GGML_TYPE_F32, "float16": llama_cpp.GGML_TYPE_F16}
_SILENCE = llama_cpp.llama_log_callback(lambda level, text, user: None)  # kept: it is called whenever
llama_cpp.llama_log_set(_SILENCE, ctypes.c_void_p(0))  # it tells hundreds of lines about each model


@functools.lru_cache(maxsize=1)
def load(model_dir: pathlib.Path, dtype: str) -> Any:
    """The model; the last one is kept."""
    with tempfile.TemporaryDirectory() as directory:  # what is mapped stays when the name is gone
        path = pathlib.Path(directory) / "model.gguf"
        write_llama(model_dir, path, dtype)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise RuntimeError(f"llama.cpp does not load what was written of {model_dir}")
    return model


def make(setting: Setting, name: str, num_threads: int) -> Generate:
    """With a cache of `setting.dtype` that is as long as the sequences get."""
    del name
    model, size = load(setting.model_dir, setting.dtype), setting.batch_size
    params = llama_cpp.llama_context_default_params()
    params.n_ctx = size * (setting.prompt_tokens + setting.new_tokens)
    together = max(1, min(size, _BATCH_TOKENS // setting.prompt_tokens))  # prompts that are read at once
    params.n_batch = params.n_ubatch = max(size, together * setting.prompt_tokens)
    params.n_seq_max = size
    params.n_threads = params.n_threads_batch = num_threads or len(os.sched_getaffinity(0))
    params.type_k = params.type_v = _CACHE_TYPES[setting.dtype]
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp has no room for {params.n_ctx} tokens of cache")
    vocab: Any = llama_cpp.llama_model_get_vocab(model)
    memory: Any = llama_cpp.llama_get_memory(context)
    vocab_size = llama_cpp.llama_vocab_n_tokens(vocab)
    batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def run(entries: list[tuple[int, int, int, bool]]) -> list[int]:
        """Of each (token, position, sequence, whether its logits count): the likeliest tokens of those that count."""
        batch.n_tokens = len(entries)
        for i, (token, position, sequence, counts) in enumerate(entries):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, position, 1, sequence
            batch.logits[i] = counts
        if status := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        rows = [llama_cpp.llama_get_logits_ith(context, i) for i, entry in enumerate(entries) if entry[3]]
        return [int(np.ctypeslib.as_array(row, (vocab_size,)).argmax()) for row in rows]

    def generate(prompts: list[list[int]]) -> Generated:
        llama_cpp.llama_memory_clear(memory, True)
        start = time.perf_counter()
        last, tokens = setting.prompt_tokens - 1, []
        numbered = [*enumerate(prompts)]
        for first in range(0, len(prompts), together):
            group = numbered[first : first + together]
            entries = [(token, i, number, i == last) for number, prompt in group for i, token in enumerate(prompt)]
            tokens += [[token] for token in run(entries)]
        first_s = time.perf_counter() - start
        for position in range(setting.prompt_tokens, setting.prompt_tokens + setting.new_tokens):
            found = run([(row[-1], position, sequence, True) for sequence, row in enumerate(tokens)])
            for row, token in zip(tokens, found, strict=True):
                row.append(token)
        return Generated(tokens, first_s, time.perf_counter() - start - first_s)

    return generate
