"""Every field of EngineConfig refuses what it cannot be, naming its flag; and every field has a flag."""

import dataclasses
import re
from typing import Any

import pytest
from absl import flags

from jaxinfer import engine_flags
from jaxinfer.engine_config import NOT_FLAGS, EngineConfig


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EngineConfig)])
def test_no_field_takes_a_value_of_another_type(name: str):
    fields: dict[str, Any] = {name: [1]}
    with pytest.raises(ValueError, match=rf"^--{name}=\[1\]: must be "):
        EngineConfig(**fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("max_num_seqs", 0, "--max_num_seqs=0: must be an integer of at least 1"),
        ("max_num_seqs", None, "--max_num_seqs=None: must be an integer"),
        ("max_num_seqs", True, "--max_num_seqs=True: must be an integer"),
        ("max_num_batched_tokens", 0, "--max_num_batched_tokens=0: must be an integer of at least 1"),
        ("decode_steps", 0, "--decode_steps=0: must be an integer of at least 1"),
        ("max_model_len", 1, "--max_model_len=1: must be an integer of at least 2"),
        ("max_model_len", 8.0, "--max_model_len=8.0: must be an integer or None"),
        ("page_size", 0, "--page_size=0: must be an integer of at least 1"),
        ("kv_cache_bytes", 0, "--kv_cache_bytes=0: must be an integer of at least 1"),
        ("memory_fraction", "0.5", "--memory_fraction='0.5': must be a number"),
        ("memory_fraction", True, "--memory_fraction=True: must be a number"),
        ("memory_fraction", 0, "--memory_fraction=0: must be above 0 and at most 1"),
        ("memory_fraction", 1.1, "--memory_fraction=1.1: must be above 0 and at most 1"),
        ("memory_fraction", float("nan"), "--memory_fraction=nan: must be above 0 and at most 1"),
        ("mesh", None, "--mesh=None: must be text"),
        ("sharding", None, "--sharding=None: must be text"),
        ("model", 3, "--model=3: must be text or None"),
        ("show_progress", 1, "--show_progress=1: must be True or False"),
        ("dtype", "int8", "--dtype=int8: unknown; known: auto, float32, bfloat16, float16"),
        ("kv_cache_dtype", "int4", "--kv_cache_dtype=int4: unknown; known: auto, int8, fp8, fp8_e4m3"),
        ("generation_config", "yes", "--generation_config=yes: unknown; known: auto, none"),
        ("seed", -1, "--seed=-1: must be an integer in [0, 2**32)"),
        ("seed", 2**32, "--seed=4294967296: must be an integer in [0, 2**32)"),
    ],
)
def test_a_value_that_cannot_be_is_refused(field: str, value: Any, message: str):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        EngineConfig(**{field: value})


def test_whole_numbers_are_numbers_and_the_ends_of_ranges_are_legal():
    EngineConfig(memory_fraction=1, max_model_len=2, max_num_seqs=1, seed=2**32 - 1, page_size=1, decode_steps=1)


def test_every_field_is_a_flag_but_those_named():
    module = flags.FLAGS.find_module_defining_flag("max_num_seqs")
    assert module == engine_flags.__name__
    names = {flag.name for flag in flags.FLAGS.get_flags_for_module(module)}
    assert {field.name for field in dataclasses.fields(EngineConfig)} - names == NOT_FLAGS
