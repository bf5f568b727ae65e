"""One model over many devices: the same tokens as on one, and in the compiled step no collective beyond the plan."""

import dataclasses
import functools
import math
import pathlib
import re

import jax.numpy as jnp
import pytest

from jaxinfer import kv_cache
from jaxinfer.batch import StepShape
from jaxinfer.hf_config import HFConfig
from jaxinfer.models import llama
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.sampler_programs import SamplerPrograms
from jaxinfer.sampling_params import MAX_LOGPROBS
from sharding_rules import axes as ax
from tests.parity import driver, recipe

MESHES = ("data:2", "data:8", "tensor:2", "tensor:4", "tensor:8", "data:2,tensor:4")
CONFIG = recipe.tiny_config("llama", "gqa")
SHAPES = driver.Shapes(rows=4, max_len=128, chunk=64, num_steps=4)
PROMPT_LENGTHS = (1, 4, 15, 17, 33, 64, 70, 100, 5)  # more than the slots of some meshes: requests also queue
NUM_TOKENS = 20


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return recipe.write_model(tmp_path_factory.mktemp("meshes") / "model", CONFIG, recipe.weights("llama", CONFIG))


def generate(model_dir: pathlib.Path, mesh: str) -> list[list[int]]:
    runner = driver.make_runner(*driver.load(model_dir, mesh), SHAPES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplerPrograms, "lowerings", lambda *_: {})  # tests/test_extras_on_meshes.py has them
        runner.compile_all()
    prompts = [recipe.prompt(length, 128, seed) for seed, length in enumerate(PROMPT_LENGTHS)]
    return driver.generate(runner, SHAPES, prompts, NUM_TOKENS)


@pytest.fixture(scope="module")
def on_one_device(model_dir: pathlib.Path) -> list[list[int]]:
    return generate(model_dir, "")


@pytest.mark.parametrize("mesh", MESHES)
def test_same_tokens_as_on_one_device(mesh: str, model_dir: pathlib.Path, on_one_device: list[list[int]]):
    assert generate(model_dir, mesh) == on_one_device


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled decode step.

    Attributes:
      collectives: (operation, elements of its result on one device) of each.
      cache_copies: instructions that copy a whole cache array.
      alias_bytes, cache_bytes: of one device.
      activation_size: elements of one device's rows of activations, [B, 1, D].
    """

    collectives: list[tuple[str, int]]
    cache_copies: list[str]
    alias_bytes: int
    cache_bytes: int
    activation_size: int
    logits_size: int
    logits_stay_in_branch: bool

    @property
    def large(self) -> list[tuple[str, int]]:
        """Collectives of activations, or of anything larger: logits, weights, pages."""
        return [(op, size) for op, size in self.collectives if size >= self.activation_size]


_COLLECTIVE = re.compile(
    r" = (.*?) (all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast)(?:-start)?\("
)


@functools.cache
def compile_step(
    num_layers: int, mesh: str, unsplit: str | None = None, chunk_tokens: int = 0, num_steps: int = SHAPES.num_steps
) -> Step:
    """`unsplit` is a logical axis that is left whole, against the mesh's strategy."""
    config = llama.parse_config(HFConfig(CONFIG | {"num_hidden_layers": num_layers}))
    partitioner = Partitioner.create(mesh)
    if unsplit is not None:
        rules = dataclasses.replace(partitioner.rules, rules={**partitioner.rules.rules, unsplit: ()})
        partitioner = dataclasses.replace(partitioner, rules=rules)
    definition = ModelDefinition.create(config, partitioner, jnp.dtype("float32"))
    programs = driver.step_programs(definition, SHAPES)
    buckets = SHAPES.buckets()
    chunks, num_steps = (buckets.num_chunks, 1) if chunk_tokens else (0, num_steps)
    compiled = programs.lowered(StepShape(chunk_tokens, chunks, SHAPES.rows, buckets.pages[0], num_steps)).compile()
    hlo, memory = compiled.as_text(), compiled.memory_analysis()
    assert hlo is not None and memory is not None
    spec = driver.cache_spec(definition, SHAPES)
    page_shape = kv_cache.cache_sharding(spec, partitioner).shard_shape(spec.shape)
    shape_text = ",".join(map(str, page_shape))
    return Step(
        collectives=[(op, _num_elements(result)) for result, op in _COLLECTIVE.findall(hlo)],
        cache_copies=re.findall(rf"f32\[{shape_text}\]\S* copy\(.*", hlo),
        alias_bytes=memory.alias_size_in_bytes,
        cache_bytes=2 * config.num_layers * math.prod(page_shape) * spec.dtype.itemsize,  # 2: keys and values
        activation_size=SHAPES.rows * config.embed_dim,
        logits_size=SHAPES.rows * config.vocab_size,
        logits_stay_in_branch=_only_in_branches(hlo, f"f32[{SHAPES.rows},{config.vocab_size}]"),
    )


def _only_in_branches(hlo: str, shape: str) -> bool:
    """Whether every all-gather of `shape` stands in a computation that a conditional calls as a branch."""
    branches = set(re.findall(r"%[\w.]+", " ".join(re.findall(r"branch_computations=\{(.*?)\}", hlo))))
    computation = ""
    for line in hlo.splitlines():
        if not line.startswith(" ") and line.endswith("{"):
            computation = line.split()[0]
        elif re.search(rf" = {re.escape(shape)}\S* all-gather\(", line) and computation not in branches:
            return False
    return True


def test_a_gather_outside_a_branch_is_seen():
    """The twin of the check above, on HLO made by hand."""
    call = "  %c = f32[4] conditional(%p), branch_computations={%a, %b}\n}\n"
    gather = "{\n  %g = f32[4,128]{0,1} all-gather(%x)\n}\n"
    assert _only_in_branches(f"%b () -> f32[4] {gather}%main () -> f32[4] {{\n{call}", "f32[4,128]")
    assert not _only_in_branches(f"%body () -> f32[4] {gather}%main () -> f32[4] {{\n{call}", "f32[4,128]")


def _num_elements(shapes: str) -> int:
    """ "(f32[4,1,64]{2,1,0}, f32[4])" -> 260"""
    return sum(math.prod(int(n) for n in dims.split(",") if n) for dims in re.findall(r"\[([\d,]*)\]", shapes))


def expected_collectives(step: Step, num_layers: int, mesh: str) -> list[tuple[str, int]]:
    if ax.TENSOR not in mesh:
        return []
    return [("all-gather", step.logits_size)] + [("all-reduce", step.activation_size)] * (1 + 2 * num_layers)


@pytest.mark.parametrize("unsplit", [ax.MLP, ax.VOCAB])
def test_a_collective_more_or_less_is_seen(unsplit: str):
    """The twin of the count below: an MLP left whole needs no all-reduce, a vocabulary left whole no embedding's."""
    step = compile_step(2, "tensor:2", unsplit)
    assert sorted(step.large) != expected_collectives(step, 2, "tensor:2")


@pytest.mark.parametrize("mesh", MESHES)
def test_collectives_of_a_decode_step(mesh: str):
    """With `tensor` two all-reduces a layer, after attention and after the MLP; with `data` alone none.

    One more all-reduce outside the layers: a token's embedding is found on the device that holds its part of the
    vocabulary. Everything else is a few numbers per row: the best logit of each part of the vocabulary and its
    place, whether all logits are finite, and the tokens for every host. In particular no weight and no page
    travels; logits do only in the branch that a greedy batch never takes.
    """
    steps = {num_layers: compile_step(num_layers, mesh) for num_layers in (2, 4)}
    per_layer = 2 if ax.TENSOR in mesh else 0
    for num_layers, step in steps.items():
        assert sorted(step.large) == expected_collectives(step, num_layers, mesh)
        assert step.logits_stay_in_branch
    assert len(steps[4].collectives) - len(steps[2].collectives) == 2 * per_layer


@pytest.mark.parametrize("mesh", ["data:2", "tensor:2", "data:2,tensor:4"])
def test_a_step_that_gives_its_logits_out_moves_no_more(mesh: str):
    step = compile_step(2, mesh, num_steps=1)
    assert sorted(step.large) == expected_collectives(step, 2, mesh) and step.logits_stay_in_branch


@pytest.mark.parametrize("mesh", ["data:2", "data:8", "tensor:2", "data:2,tensor:4"])
def test_extras_move_logits_once_and_nothing_else(mesh: str):
    """With `tensor` the parts of the logits come together. Beside that only what the host reads travels."""
    config = llama.parse_config(HFConfig(CONFIG))
    definition = ModelDefinition.create(config, Partitioner.create(mesh), jnp.dtype("float32"))
    programs = driver.step_programs(definition, SHAPES)
    batch = programs.batch(StepShape(0, 0, SHAPES.rows, SHAPES.buckets().pages[0], 1))
    num_shards = batch.slots.shape[0]
    collectives = {}
    sampler = SamplerPrograms(definition, programs.extras_spec)
    for name, lower in sampler.lowerings([batch], definition.abstract_arrays).items():
        found = _COLLECTIVE.findall(lower().compile().as_text() or "")
        collectives[name] = [(op, _num_elements(result)) for result, op in found]
    for name, num_tokens in ((SHAPES.rows, SHAPES.rows), ("score", SHAPES.chunk)):
        for_host = [("all-gather", num_shards * num_tokens * width) for width in (1, MAX_LOGPROBS)]
        moved = [collective for collective in collectives[name] if collective not in for_host]
        num_logits = min(num_tokens, 32) * config.vocab_size  # of a block
        assert moved == [("all-gather", num_logits)] * (ax.TENSOR in mesh), name
    assert collectives["load"] == []


@pytest.mark.parametrize("chunk_tokens", [0, SHAPES.chunk], ids=["decode", "chunk"])
@pytest.mark.parametrize("mesh", ["", *MESHES])
def test_cache_is_written_in_place(mesh: str, chunk_tokens: int):
    step = compile_step(2, mesh, chunk_tokens=chunk_tokens)
    slot_bytes = SHAPES.rows * (4 + 1)  # a token and a flag each
    assert step.alias_bytes == step.cache_bytes + slot_bytes
    assert not step.cache_copies
