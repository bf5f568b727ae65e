"""The presets in configs/: each fits the GPUs that it is for, and its programs compile. Nothing is allocated."""

import dataclasses
import functools
import math
import pathlib
import re
import tomllib
from typing import Any

import jax.numpy as jnp
import pytest
from absl import flags
from absl.testing import flagsaver

from jaxinfer import cli_flags, engine_flags, kv_cache
from jaxinfer.batch import Buckets
from jaxinfer.engine_config import EngineConfig
from jaxinfer.memory import Demand
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.step_programs import StepPrograms
from pallas_kernels.paged_attention import xla
from sharding_rules import axes as ax
from tests import published
from tests.long_campaign import chosen

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
# By file: the model's published config, and bytes of a GPU. Vendors count at least so many; drivers take some of it,
# which XLA_PYTHON_CLIENT_MEM_FRACTION in the file's command line leaves them.
PRESETS = {
    "llama_3_1_8b_h100": ("llama_3_1_8b_instruct", 80e9),
    "llama_3_1_70b_8xh100": ("llama_3_1_70b_instruct", 80e9),
    "mixtral_8x7b_2xh100": ("mixtral_8x7b_instruct_v0_1", 80e9),
    "qwq_32b_2x48gb": ("qwq_32b", 48e9),
    "qwen_2_5_7b_24gb": ("qwen_2_5_7b_instruct", 24e9),
}
DEMO = "demo_eight_devices"  # runs in tests/test_config_file.py
DEFAULT_MEM_FRACTION = 0.75  # JAX's
PAGE_SIZE, MIN_CHUNK = 64, 128  # on a GPU
DOES_NOT_FIT = r"leave \d+ bytes for the cache of .* would fit: "

every_preset = pytest.mark.parametrize("name", PRESETS)
some_presets = pytest.mark.parametrize("name", chosen([*PRESETS], "llama_3_1_70b_8xh100", "mixtral_8x7b_2xh100"))
pytestmark = pytest.mark.usefixtures("whole_contexts")


def text(name: str) -> str:
    return (CONFIGS / f"{name}.toml").read_text(encoding="utf-8")


def mem_fraction(name: str) -> float:
    """What the command line at the top gives JAX of a GPU's memory."""
    comment = "\n".join(line for line in text(name).splitlines() if line.startswith("#"))
    command = (
        rf"XLA_PYTHON_CLIENT_MEM_FRACTION=(\S+) run_inference --config=configs/{name}.toml [\\\s#]*--model=path/to/"
    )
    (fraction,) = re.findall(command, comment)
    return float(fraction)


@functools.cache
def engine_config(name: str) -> EngineConfig:
    """As `run_inference` would make it."""
    with flagsaver.flagsaver():
        cli_flags.parse(["run_inference", f"--config={CONFIGS / name}.toml"])
        fields = engine_flags.engine_fields()
    return EngineConfig(**fields)


@functools.cache
def definition(name: str, num_layers: int | None = None, *, on_devices: bool = False) -> ModelDefinition:
    """In bfloat16, `num_layers` its first ones."""
    config, model = engine_config(name), published.read(PRESETS[name][0])
    if num_layers is not None:
        model = dataclasses.replace(model, num_layers=num_layers, windows=model.windows[:num_layers])
    partitioner = (Partitioner.create if on_devices else Partitioner.abstract)(config.mesh, config.sharding)
    return ModelDefinition.create(model, partitioner, jnp.dtype("bfloat16"))


def demand(name: str, fraction: float, **changes: Any) -> Demand:
    return Demand.of(
        definition(name),
        config=dataclasses.replace(engine_config(name), **changes),
        page_size=PAGE_SIZE,
        attention=xla,
        free_bytes=int(fraction * PRESETS[name][1]),
    )


def step_programs(name: str, num_layers: int | None = None) -> StepPrograms:
    """Over as many of this machine's virtual devices, with the pages that the plan has."""
    config, model = engine_config(name), definition(name, num_layers, on_devices=True)
    assert config.max_model_len is not None
    num_shards = model.partitioner.num_shards(ax.BATCH)
    buckets = Buckets.create(
        max_rows=config.max_num_seqs // num_shards,
        max_model_len=config.max_model_len,
        max_chunk=config.max_num_batched_tokens,
        page_size=PAGE_SIZE,
        decode_steps=config.decode_steps,
        num_shards=num_shards,
        min_chunk=MIN_CHUNK,
    )
    pages = demand(name, mem_fraction(name)).plan().pages_per_shard
    sizes = {"pages_per_shard": pages, "page_size": PAGE_SIZE, "dtype": model.dtype}
    spec = kv_cache.cache_spec(model.decoder_config, model.partitioner, **sizes)
    return StepPrograms(definition=model, cache_spec=spec, buckets=buckets, backend="xla")


def test_every_file_is_here():
    assert {f"{name}.toml" for name in (*PRESETS, DEMO)} == {p.name for p in CONFIGS.glob("*.toml")}


@pytest.mark.parametrize("name", [*PRESETS, DEMO])
def test_every_key_is_a_flag_and_says_something(name: str):
    engine_config(name)  # would refuse a key that is none
    defaults = dataclasses.asdict(EngineConfig())
    for key, value in tomllib.loads(text(name)).items():
        assert value not in (flags.FLAGS[key].default, defaults.get(key)), f"{key} = {value!r} is the default"


@every_preset
def test_it_fits_and_holds_what_its_comment_says(name: str):
    asked = demand(name, mem_fraction(name))
    plan = asked.plan()
    held = plan.weights_bytes + plan.cache_bytes + plan.workspace_bytes
    assert asked.free_bytes is not None and held <= asked.config.memory_fraction * asked.free_bytes
    assert plan.max_concurrency >= 1
    sizes = f"{plan.max_concurrency} {{}} of {asked.config.max_model_len} tokens at once"
    assert sizes.format("conversations") in text(name)
    gib = r"\d+\.\d\d GiB"
    line = f"memory per device: {gib} weights \\+ {gib} cache \\+ {gib} workspace of {gib} free\ncache: \\d+ tokens in "
    assert re.match(line, str(plan)) and str(plan).endswith(sizes.format("sequences"))


@every_preset
def test_what_it_says_of_jaxs_default_is_true(name: str):
    is_refused = "and the model does not fit" in text(name)
    if is_refused:
        with pytest.raises(ValueError, match=DOES_NOT_FIT):
            demand(name, DEFAULT_MEM_FRACTION).plan()
    else:
        demand(name, DEFAULT_MEM_FRACTION).plan()


@some_presets
def test_a_flag_that_is_too_large_is_refused_with_one_that_fits(name: str):
    """And the preset's own is no larger than that."""
    with pytest.raises(ValueError, match=DOES_NOT_FIT) as caught:
        demand(name, mem_fraction(name), max_num_seqs=2**16).plan()
    (advised,) = re.findall(r"--max_num_seqs=(\d+)", str(caught.value))
    assert engine_config(name).max_num_seqs <= int(advised) < 2**16


@some_presets
def test_its_programs_compile(name: str):
    """Their first two layers, which all others are like. They take what the plan says that a device holds."""
    programs = step_programs(name, num_layers=2)
    pages = math.prod(
        kv_cache.cache_sharding(programs.cache_spec, programs.definition.partitioner).shard_shape(
            programs.cache_spec.shape
        )
    )
    cache_bytes = 2 * 2 * pages * 2  # layers, keys and values, bytes
    largest = [max(s for s in programs.buckets.shapes() if bool(s.chunk_tokens) == chunks) for chunks in (True, False)]
    for shape in largest:
        memory = programs.lowered(shape).compile().memory_analysis()
        assert memory is not None
        held = programs.definition.shard_bytes + cache_bytes
        assert held < memory.argument_size_in_bytes < 1.01 * held


@some_presets
def test_all_its_layers_lower(name: str):
    programs = step_programs(name)
    shape = max(shape for shape in programs.buckets.shapes() if not shape.chunk_tokens)
    module = programs.lowered(shape).as_text()
    assert module.count("dot_general") >= 7 * published.read(PRESETS[name][0]).num_layers
