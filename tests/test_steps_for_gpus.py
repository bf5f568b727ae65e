"""What XLA makes of an engine's steps for a GPU. Compiled, not run: no GPU is needed."""

import functools
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from jaxinfer import kv_cache
from jaxinfer.batch import StepShape
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.tools import bench_models
from tests import gpu_targets
from tests.compiled_steps import collectives
from tests.parity import driver

pytestmark = pytest.mark.skipif(gpu_targets.missing() is not None, reason=str(gpu_targets.missing()))

NUM_LAYERS = 3
SHAPES = driver.Shapes(rows=8, max_len=4096, chunk=512, page_size=64, num_steps=4)
THUNKS = "thunk_sequence_after_thunk_passes.txt"


class Step:
    """A loop of decode steps of the first layers of an 8B Llama, for H100s."""

    def __init__(self, mesh: str, num_devices: int, directory: pathlib.Path, backend: str = "triton"):
        config = llama.parse_config(HFConfig(bench_models.hf_config("8b", NUM_LAYERS)))
        partitioner = Partitioner.create(mesh, devices=gpu_targets.devices("h100", num_devices))
        definition = ModelDefinition.create(config, partitioner, jnp.dtype("bfloat16"))
        programs = driver.step_programs(definition, SHAPES, backend=backend)
        shape = StepShape(0, 0, SHAPES.rows, SHAPES.buckets().pages[0], SHAPES.num_steps)
        lower = functools.partial(programs.lowered, shape)
        compiled = gpu_targets.compile_on(partitioner.device_mesh, lower, xla_dump_to=str(directory))
        memory, hlo = compiled.memory_analysis(), compiled.as_text()
        assert memory is not None and hlo is not None
        (thunks,) = directory.glob(f"*.jit_decode.{THUNKS}")
        self.definition, self.memory, self.hlo, self.thunks = definition, memory, hlo, thunks.read_text("utf-8")
        self.num_batch_arrays = len(jax.tree.leaves(programs.arguments(shape)[2:]))
        spec = programs.cache_spec
        self.page_shape = kv_cache.cache_sharding(spec, partitioner).shard_shape(spec.shape)
        self.cache_bytes = 2 * NUM_LAYERS * jnp.zeros(1, spec.dtype).nbytes * math.prod(self.page_shape)

    @property
    def pages(self) -> str:
        return ",".join(map(str, self.page_shape))


@pytest.fixture(scope="module")
def step(tmp_path_factory: pytest.TempPathFactory) -> Step:
    return Step("", 1, tmp_path_factory.mktemp("dump"))


def graphs(thunks: str) -> list[list[str]]:
    """The kernels of each command buffer (a CUDA graph), which stand below it, further to the right."""
    found, margin = [], None
    for line in thunks.splitlines():
        match = re.match(r"( *)\d+: (\w+)", line)
        if match is None:
            continue
        if margin is not None and len(match[1]) > margin:
            found[-1].append(line)
        else:
            margin = None
        if match[2] == "kCommandBuffer":
            margin = len(match[1])
            found.append([])
    return found


def test_one_graph_has_all_layers(step: Step):
    """And the draw behind them: the host starts one thing for all of a step."""
    in_graphs = [sum("_attend_kernel" in line for line in graph) for graph in graphs(step.thunks)]
    assert sorted(in_graphs, reverse=True)[:2] == [NUM_LAYERS, 0]
    (graph,) = (graph for graph in graphs(step.thunks) if any("_attend_kernel" in line for line in graph))
    assert sum("_merge_kernel" in line for line in graph) == NUM_LAYERS
    assert sum("gemm" in line for line in graph) >= 4 * NUM_LAYERS + 1  # the head's too
    assert ["_noise_kernel" in line or "_choice_kernel" in line for line in graph].count(True) == 2


def test_the_host_is_asked_nothing_within_a_dispatch(step: Step):
    """A condition, or a loop without a known end, waits for the GPU to tell the host how it goes on."""
    kinds = re.findall(r"\d+: (\w+)", step.thunks)
    assert "kConditional" not in kinds and kinds.count("kWhile") == 1
    assert re.findall(r'"known_trip_count":{"n":"(\d+)"', step.hlo) == [str(SHAPES.num_steps)]
    assert not re.findall(r" (?:infeed|outfeed|send|recv|copy-start)\(", step.hlo)


def test_a_dispatch_has_few_arrays_beside_weights_and_cache(step: Step):
    """Each costs the host time."""
    assert step.num_batch_arrays <= 16


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="before, what Mosaic compiles is started outside of graphs")
def test_one_graph_has_all_layers_with_the_kernels_for_hopper(tmp_path: pathlib.Path):
    found = graphs(Step("", 1, tmp_path, "mosaic_gpu").thunks)
    assert max(sum("kCustomCall" in line for line in graph) for graph in found) == 2 * NUM_LAYERS  # they have no names


def test_the_work_list_is_made_once_for_all_layers(step: Step):
    layers = re.findall(r'op_name="[^"]*/(layer_\d+)/[^"]*work_list', step.hlo)
    assert set(layers) == {"layer_0"}


def test_the_cache_stays_in_place(step: Step):
    assert step.memory.alias_size_in_bytes >= step.cache_bytes
    assert not re.findall(rf"bf16\[{step.pages}\]\S* copy\(", step.hlo)


def test_nothing_is_as_large_as_the_gathered_context(step: Step):
    """The XLA path gathers keys and values of whole block tables."""
    config = step.definition.decoder_config
    gathered = 2 * 2 * SHAPES.rows * SHAPES.max_len * config.num_kv_heads * config.head_dim  # keys and values, 2 bytes
    assert step.memory.temp_size_in_bytes < gathered / 4


def test_split_over_gpus_no_page_travels(tmp_path: pathlib.Path):
    step = Step("tensor:4", 4, tmp_path)
    config, travels = step.definition.decoder_config, collectives(step.hlo)
    sums = [size for op, size in travels if op == "all-reduce" and size == SHAPES.rows * config.embed_dim]
    assert len(sums) == 2 * NUM_LAYERS + 1
    logits = SHAPES.rows * config.vocab_size
    assert max(size for _, size in travels) <= logits + logits // 4  # gathered, beside a device's own
    assert step.memory.alias_size_in_bytes >= step.cache_bytes
