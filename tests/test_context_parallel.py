"""Pages of a sequence on several devices: whatever lies where, attention is what one device computes."""

import dataclasses
import functools
import re
import types
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import Engine, kv_cache
from jaxinfer.attention import PagedAttention, Prompts, Rows
from jaxinfer.context_parallel import own_pages
from jaxinfer.engine_config import EngineConfig
from jaxinfer.integers import cdiv
from jaxinfer.memory import Demand
from jaxinfer.page_allocator import device_and_row
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from pallas_kernels.paged_attention import AttentionSpec, backend, blocks, xla
from pallas_kernels.paged_attention.pages import Pages
from sharding_rules import axes as ax
from tests import published
from tests.compiled_steps import CONFIG, SHAPES, compile_step

PAGE_SIZE, NUM_COLUMNS = 4, 23  # which no number of devices divides
NUM_ROWS, NUM_PROMPTS, NUM_TOKENS = 4, 3, 40  # of each data shard; the tokens are the prompts', some of them padding
PAGES_EACH = 1 + (NUM_ROWS + NUM_PROMPTS) * NUM_COLUMNS  # of a device, so that one could have all


@dataclasses.dataclass(frozen=True)
class Case:
    mesh: str
    num_q_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 16
    window: int | None = None
    soft_cap: float | None = None
    value_dim: int | None = None
    has_sinks: bool = False

    def spec(self, partitioner: Partitioner) -> AttentionSpec:
        return AttentionSpec(
            num_q_heads=self.num_q_heads // partitioner.num_shards(ax.HEADS),
            num_kv_heads=self.num_kv_heads // partitioner.num_shards(ax.KV_HEADS),
            head_dim=self.head_dim,
            page_size=PAGE_SIZE,
            scale=self.head_dim**-0.5,
            window=self.window,
            soft_cap=self.soft_cap,
            value_dim=self.value_dim,
            context_size=partitioner.context_size,
        )


CASES = [
    Case("context:2"),
    Case("context:4", window=21, soft_cap=0.5),
    Case("context:8", num_kv_heads=8, window=5, has_sinks=True),
    Case("context:8", num_kv_heads=1, head_dim=24, value_dim=16),
    Case("data:2,context:4", soft_cap=2.0, has_sinks=True),
    Case("context:4,tensor:2", window=50, has_sinks=True),
]
CASES_OF_EACH = 34  # 204 together


@functools.cache
def step(case: Case, mesh: str):
    """Writes and attends: (q, k, v, pages, rows, prompts, sinks) -> (out, pages), over `mesh`."""
    partitioner = Partitioner.create(mesh)
    spec = case.spec(partitioner)

    @jax.jit
    def attend(q, k, v, cache, rows, prompts, sinks):
        of_step = PagedAttention(
            cache, rows, prompts, specs=[(spec,)], backend=backend("xla", spec), partitioner=partitioner
        )
        return of_step(0, q, k, v, sinks=sinks), of_step.cache

    return attend


def arrays(case: Case, rng: np.random.Generator) -> dict:
    """A step of some rows and prompts, over pages that are anywhere and NaN where nothing may be read."""
    partitioner = Partitioner.create(case.mesh)
    num_shards, num_devices = partitioner.num_shards(ax.BATCH), partitioner.context_size
    num_sequences = NUM_ROWS + NUM_PROMPTS
    pool = (num_shards * num_devices * PAGES_EACH, case.num_kv_heads, PAGE_SIZE, case.head_dim)
    has_values = case.value_dim is None
    pools = [np.full(pool, np.nan, np.float32) for _ in range(1 + has_values)]
    tables = np.zeros((num_shards, num_sequences, NUM_COLUMNS), np.int32)
    starts = rng.integers(0, NUM_COLUMNS * PAGE_SIZE - NUM_TOKENS, (num_shards, num_sequences)).astype(np.int32)
    lengths = np.sort(rng.integers(0, NUM_TOKENS + 1, (num_shards, NUM_PROMPTS + 1)), axis=1)
    lengths = np.diff(lengths, axis=1).astype(np.int32)
    for shard in range(num_shards):
        free = {device: iter(rng.permutation(np.arange(1, PAGES_EACH))) for device in range(num_devices)}
        news = [*np.ones(NUM_ROWS, int), *lengths[shard]]
        for sequence, (start, new) in enumerate(zip(starts[shard], news, strict=True)):
            some = rng.permutation(num_devices)[: rng.integers(1, num_devices + 1)]  # often not all have some
            for column in range(cdiv(int(start) + new, PAGE_SIZE)):
                device = rng.choice(some)
                row = next(free[device])
                tables[shard, sequence, column] = row * num_devices + device
                for pages in pools:
                    cached = pages[(shard * num_devices + device) * PAGES_EACH + row]
                    num_cached = np.clip(start - column * PAGE_SIZE, 0, PAGE_SIZE)
                    num_hidden = 0 if case.window is None else start + 1 - case.window - column * PAGE_SIZE
                    where = slice(np.clip(num_hidden, 0, num_cached), num_cached)
                    cached[:, where] = rng.normal(size=cached[:, where].shape)
    tokens = (num_shards, NUM_ROWS + NUM_TOKENS)
    new_kv = (rng.normal(size=(*tokens, case.num_kv_heads, case.head_dim)).astype(np.float32) for _ in range(2))
    rows = (tables[:, :NUM_ROWS], starts[:, :NUM_ROWS], rng.random((num_shards, NUM_ROWS)) < 0.8)
    return {
        "q": rng.normal(size=(*tokens, case.num_q_heads, case.head_dim)).astype(np.float32),
        "k": next(new_kv),
        "v": next(new_kv) if has_values else None,
        "cache": ((pools[0], pools[1] if has_values else None),),
        "rows": Rows(*map(jnp.asarray, rows)),
        "prompts": Prompts(*map(jnp.asarray, (tables[:, NUM_ROWS:], starts[:, NUM_ROWS:], lengths))),
        "sinks": rng.normal(0, 4, case.num_q_heads).astype(np.float32) if case.has_sinks else None,
    }


def on_one_device(of_step: dict, case: Case) -> tuple[np.ndarray, tuple]:
    """The same by one device, on the same pages under their other names: one data shard after the other."""
    num_devices = Partitioner.create(case.mesh).context_size
    outs, cache = [], of_step["cache"]
    for shard in range(len(of_step["q"])):
        one = jax.tree.map(lambda x, s=shard: x[s : s + 1], {k: of_step[k] for k in ("q", "k", "v", "rows", "prompts")})
        for name in ("rows", "prompts"):
            ids = one[name].block_tables
            device, row = device_and_row(ids, num_devices)
            ids = np.where(ids, (shard * num_devices + device) * PAGES_EACH + row, 0).astype(np.int32)
            one[name] = one[name]._replace(block_tables=ids)
        out, cache = step(case, "")(**one, cache=cache, sinks=of_step["sinks"])
        outs.append(np.asarray(out))
    return np.concatenate(outs), cache


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_placement_is_attention_by_one_device(case: Case):
    partitioner = Partitioner.create(case.mesh)
    pages_of = partitioner.sharding(kv_cache.PAGE_AXES)
    for seed in range(CASES_OF_EACH):
        of_step = arrays(case, np.random.default_rng(seed))
        expected, expected_cache = on_one_device(of_step, case)
        out, cache = step(case, case.mesh)(**of_step | {"cache": jax.device_put(of_step["cache"], pages_of)})
        num_valid = NUM_ROWS + np.sum(of_step["prompts"].lengths, axis=1)
        for shard, count in enumerate(num_valid):
            mine, theirs = np.asarray(out)[shard, :count], expected[shard, :count]
            assert np.isfinite(theirs).all()
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max(), err_msg=f"{seed}")
        for mine, theirs in zip(jax.tree.leaves(cache), jax.tree.leaves(expected_cache), strict=True):
            is_scratch = np.arange(len(mine)) % PAGES_EACH == 0
            np.testing.assert_array_equal(np.asarray(mine)[~is_scratch], np.asarray(theirs)[~is_scratch])


def own(tables: np.ndarray, num_devices: int) -> tuple[np.ndarray, np.ndarray]:
    """Of every device, rows and columns of its pages."""
    of_device = functools.partial(own_pages, jnp.asarray(tables), ("context",))
    rows, columns = jax.vmap(of_device, axis_name="context", axis_size=num_devices)()
    return np.asarray(rows), np.asarray(columns)


def test_own_pages_are_in_order_and_scratch_pages_are_nobodys():
    tables = np.array([[4, 7, 3, 0], [0, 0, 0, 0], [9, 5, 3, 7]], np.int32)
    rows, columns = own(tables, 2)
    assert rows.tolist() == [[[2, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]], [[3, 1, 0, 0], [0, 0, 0, 0], [4, 2, 1, 3]]]
    assert columns[0].tolist() == [[0, 4, 4, 4], [4, 4, 4, 4], [4, 4, 4, 4]]
    assert columns[1].tolist() == [[1, 2, 4, 4], [4, 4, 4, 4], [0, 1, 2, 3]]


@pytest.mark.parametrize(
    ("window", "placed", "blocks_of_each"),
    [
        (None, [c % 8 for c in range(64)], [4] * 8),
        (None, [3] * 64, [0, 0, 0, 32, 0, 0, 0, 0]),
        (None, [c // 16 for c in range(64)], [8, 8, 8, 8, 0, 0, 0, 0]),
        (256, [c // 16 for c in range(64)], [0, 0, 0, 8, 0, 0, 0, 0]),
    ],
    ids=["in turn", "all on one", "on half of them", "window"],
)
def test_a_device_loops_over_its_own_pages_only(
    window: int | None, placed: list[int], blocks_of_each: list[int], monkeypatch: pytest.MonkeyPatch
):
    """64 pages of 16 tokens, two a block: one device alone would take 32 blocks."""
    num_blocks, gather = [], blocks._gather
    monkeypatch.setattr(backend("xla"), "_CPU_BLOCK_TOKENS", 32)

    def count(pages: Pages, block_tables: jax.Array) -> Pages:
        jax.debug.callback(lambda: num_blocks.append(1))
        return gather(pages, block_tables)

    monkeypatch.setattr(blocks, "_gather", count)
    spec = AttentionSpec(
        num_q_heads=1, num_kv_heads=1, head_dim=8, page_size=16, scale=1.0, window=window, context_size=8, value_dim=8
    )
    tables = np.array([[(1 + column) * 8 + device for column, device in enumerate(placed)]], np.int32)
    q, pages, positions = jnp.ones((1, 1, 1, 8)), jnp.ones((65, 1, 16, 8)), jnp.array([[64 * 16 - 1]], jnp.int32)
    attend = jax.jit(functools.partial(backend("xla").partial_paged_attention, spec=spec))
    found = []
    for rows, columns in zip(*own(tables, 8), strict=True):
        attend(q, pages, None, rows, columns, positions)
        jax.effects_barrier()
        found.append(len(num_blocks))
        num_blocks.clear()
    assert found == blocks_of_each


@pytest.mark.parametrize(
    ("mesh", "chunk_tokens"), [("context:8", 0), ("context:4,tensor:2", 0), ("context:8", SHAPES.chunk)]
)
def test_a_layer_merges_and_moves_nothing_else(mesh: str, chunk_tokens: int):
    """Two small all-reduces of S * N * (H + 2) numbers together, as `merge` says, beside those of any mesh."""
    num_layers, partitioner = 2, Partitioner.create(mesh)
    of_step = compile_step(num_layers, mesh, chunk_tokens=chunk_tokens)
    num_tokens = SHAPES.rows + chunk_tokens
    num_heads = CONFIG["num_attention_heads"] // partitioner.axis_size(ax.TENSOR)
    merges = [("all-reduce", num_tokens * num_heads), ("all-reduce", num_tokens * num_heads * (CONFIG["head_dim"] + 1))]
    activations = [("all-reduce", num_tokens * CONFIG["hidden_size"])] * (1 + (ax.TENSOR in mesh))  # MLP, projection
    embedding = activations[:1]
    num_drawn = SHAPES.rows + (SHAPES.buckets().num_chunks if chunk_tokens else 0)
    logits = [("all-gather", num_drawn * CONFIG["vocab_size"])]
    expected = Counter([*num_layers * (merges + activations), *embedding, *logits])
    others = Counter(of_step.collectives) - expected
    assert not expected - Counter(of_step.collectives)
    assert sum(others.values()) == 4  # the best logit of each part and its place, and whether all are finite, twice
    assert max(size for _, size in others) <= num_drawn * partitioner.mesh.size
    assert of_step.logits_stay_in_branch
    assert of_step.alias_bytes == of_step.cache_bytes + SHAPES.rows * (4 + 1)  # a token and a flag of each slot
    assert not of_step.cache_copies


def demand(mesh: str, gpu_bytes: float, num_layers: int = 80) -> Demand:
    """Of a sequence of 131072 tokens with Llama 3.1 70B, or its first layers, in bfloat16. Nothing is allocated."""
    config = EngineConfig(mesh=mesh, max_model_len=2**17, max_num_seqs=1, max_num_batched_tokens=512)
    partitioner = Partitioner.abstract(mesh)
    model = published.read("llama_3_1_70b_instruct")
    model = dataclasses.replace(model, num_layers=num_layers, windows=model.windows[:num_layers])
    definition = ModelDefinition.create(model, partitioner, jnp.dtype("bfloat16"))
    return Demand.of(definition, config=config, page_size=64, attention=xla, free_bytes=int(gpu_bytes))


@pytest.mark.usefixtures("whole_contexts")
def test_a_long_sequence_is_planned_over_devices():
    """80 layers of 8 KV heads of 128 numbers: 320 KiB a token, and 40 GiB, of which each of 32 devices has 1.25."""
    plan = demand("context:4,tensor:8", 80e9).plan()
    print(plan)
    assert plan.cache_bytes == (1 + 2**17 // 64 // 4) * 64 * 2 * 80 * 128 * 2
    assert plan.max_concurrency == 1
    assert plan.pages_per_shard == 4 + 2**17 // 64


@pytest.mark.usefixtures("whole_contexts")
def test_what_does_not_fit_is_advised_a_larger_context():
    """The advice is enough, and half of it is not."""
    sizes = {"gpu_bytes": 3e9, "num_layers": 4}
    with pytest.raises(ValueError, match="bytes that one sequence of --max_model_len=131072 needs;") as caught:
        demand("tensor:8", **sizes).plan()
    (context_size,) = map(int, re.findall(r"--mesh=tensor:8,context:(\d+)", str(caught.value)))
    demand(f"tensor:8,context:{context_size}", **sizes).plan()
    with pytest.raises(ValueError, match=f"needs of each of its {context_size // 2} devices; would fit: "):
        demand(f"tensor:8,context:{context_size // 2}", **sizes).plan()


def test_a_device_reads_its_share_of_the_cache():
    """For the bandwidth in the summary: tokens of 6 bytes, on two data shards of four devices each."""
    memory = types.SimpleNamespace(page_bytes=96, page_size=16, num_shards=2, context_size=4)
    resolved = types.SimpleNamespace(memory=memory, definition=types.SimpleNamespace(step_shard_bytes=1000))
    stats = types.SimpleNamespace(decode_context_tokens=800, decode_steps=3)
    found = Engine.decode_bytes_per_device.fget(types.SimpleNamespace(resolved=resolved, stats=stats))  # pyright: ignore
    assert found == 3 * 1000 + 800 * 6 // 8
