"""Every attention backend against NumPy in float64, on the same specs."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer import kv_cache
from jaxinfer.attention import causal_attention
from jaxinfer.context_parallel import own_pages
from jaxinfer.integers import cdiv
from pallas_kernels.native import build
from pallas_kernels.paged_attention import AttentionSpec, backend, backends, choose, merge, triton, triton_tuning
from tests.long_campaign import IS_LONG

pytestmark = pytest.mark.any_device


@dataclasses.dataclass(frozen=True)
class Case:
    """Sequences of `lengths` cached tokens, of which the last `num_queries` ask."""

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    num_queries: int
    lengths: tuple[int, ...]
    window: int | None = None
    soft_cap: float | None = None
    has_sinks: bool = False

    @property
    def spec(self) -> AttentionSpec:
        return AttentionSpec(
            num_q_heads=self.num_q_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            page_size=self.page_size,
            scale=self.head_dim**-0.5,
            window=self.window,
            soft_cap=self.soft_cap,
        )


CASES = [
    Case(8, 2, 16, 4, 1, (1, 7, 8, 9)),
    Case(4, 4, 16, 16, 1, (33, 2)),
    Case(4, 1, 80, 8, 1, (17,)),
    Case(6, 3, 8, 1, 1, (5, 1)),
    Case(8, 2, 16, 4, 6, (6, 11, 30)),
    Case(4, 4, 32, 16, 40, (40, 64)),
    Case(8, 2, 16, 4, 1, (1, 36, 37, 38, 300), window=37),
    Case(4, 2, 16, 16, 1, (200, 3, 130), window=1),
    Case(8, 2, 16, 16, 40, (40, 90, 200), window=50, soft_cap=0.5),
    Case(4, 4, 16, 4, 1, (9, 40), soft_cap=0.5),
    Case(8, 2, 16, 4, 1, (1, 7, 90, 9), has_sinks=True),
    Case(8, 2, 16, 16, 40, (40, 90, 200), window=50, has_sinks=True),
]


TOLERANCES = {"float32": 2e-5, "float16": 3e-3, "bfloat16": 2e-2}  # a few roundings of the result


@pytest.fixture(autouse=True)
def many_small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is split on a GPU is split here, where sequences are short."""
    small = {"max_rows": 32, "block_tokens": 16, "min_blocks": 1}
    for kind, tuning in triton_tuning.DEFAULTS.items():
        monkeypatch.setitem(triton_tuning.DEFAULTS, kind, dataclasses.replace(tuning, extra_items=5, **small))


def running() -> list[Any]:
    """Every backend, but those skipped that cannot run what is tested here; they have tests of their own."""
    reasons = {name: backend(name).unsupported(CASES[0].spec, jax.devices()[0]) for name in backends()}
    return [
        pytest.param(name, marks=[pytest.mark.skip(reason=reason)] if reason else [])
        for name, reason in reasons.items()
    ]


def runs(cases: list[Case]) -> list[Any]:
    """Every backend that can, in every dtype; one that is interpreted takes long, and not each in each."""
    found = [
        pytest.param(name, dtype, case, id=f"{name}-{dtype}-{case}")
        for name in (backend.values[0] for backend in running() if not backend.marks)
        for i, case in enumerate(cases)
        for j, dtype in enumerate(TOLERANCES)
        if name == "xla" or IS_LONG or i % len(TOLERANCES) == j
        if not backend(name).unsupported(case.spec)
    ]
    assert {run.values[0] for run in found} >= {"triton", "xla"}
    return found


def make(case: Case, seed: int = 0) -> dict[str, np.ndarray]:
    """Random queries and a pool whose unused slots, and those before every window, are NaN; pages are shuffled."""
    rng = np.random.default_rng(seed)
    batch, pages_each = len(case.lengths), cdiv(max(case.lengths), case.page_size) + 1
    num_pages = 1 + batch * pages_each
    pool = (num_pages, case.num_kv_heads, case.page_size, case.head_dim)
    arrays = {
        "q": rng.normal(size=(batch, case.num_queries, case.num_q_heads, case.head_dim)).astype(np.float32),
        "k_pages": np.full(pool, np.nan, np.float32),
        "v_pages": np.full(pool, np.nan, np.float32),
        "block_tables": np.zeros((batch, pages_each), np.int32),
        "positions": np.array([np.arange(n - case.num_queries, n) for n in case.lengths], np.int32),
    }
    if case.has_sinks:  # from far below the largest score to far above
        arrays["sinks"] = rng.permutation(np.linspace(-30, 30, case.num_q_heads)).astype(np.float32)
    free = iter(rng.permutation(np.arange(1, num_pages)))
    for row, length in enumerate(case.lengths):
        for i in range(cdiv(length, case.page_size)):
            page = arrays["block_tables"][row, i] = next(free)
            used = min(case.page_size, length - i * case.page_size)
            for pages in (arrays["k_pages"], arrays["v_pages"]):
                pages[page, :, :used] = rng.normal(size=(case.num_kv_heads, used, case.head_dim))
                if case.window is not None:
                    num_hidden = length - case.num_queries + 1 - case.window - i * case.page_size
                    pages[page, :, : max(0, min(used, num_hidden))] = np.nan
    return arrays


def reference(case: Case, q, k_pages, v_pages, block_tables, positions, sinks=None) -> np.ndarray:
    """The formula of xla.py, one query at a time in float64."""
    out = np.zeros(q.shape)
    for b, t, n in np.ndindex(q.shape[:3]):
        head = n // case.spec.group_size
        first = 0 if case.window is None else max(0, positions[b, t] + 1 - case.window)
        cached = range(first, positions[b, t] + 1)
        where = [(block_tables[b, j // case.page_size], head, j % case.page_size) for j in cached]
        keys, values = (np.array([pages[w] for w in where], np.float64) for pages in (k_pages, v_pages))
        scores = keys @ q[b, t, n].astype(np.float64) * case.spec.scale
        if case.soft_cap is not None:
            scores = case.soft_cap * np.tanh(scores / case.soft_cap)
        sink = -np.inf if sinks is None else sinks[n]
        largest = max(scores.max(), sink)
        weights = np.exp(scores - largest)
        out[b, t, n] = weights @ values / (weights.sum() + np.exp(sink - largest))
    return out


@pytest.mark.parametrize(("name", "dtype", "case"), runs(CASES))
def test_matches_the_formula_and_never_reads_what_is_masked(name: str, dtype: str, case: Case):
    """Unused slots hold NaN, so that reading one shows."""
    arrays = {k: jnp.array(v) for k, v in make(case).items()}
    arrays |= {k: arrays[k].astype(dtype) for k in ("q", "k_pages", "v_pages")}
    out = jax.jit(functools.partial(backend(name, case.spec).paged_attention, spec=case.spec))(**arrays)
    assert out.dtype == dtype
    expected = reference(
        case, **{k: np.asarray(v, v.dtype if v.dtype == np.int32 else np.float64) for k, v in arrays.items()}
    )
    rtol = TOLERANCES[dtype]
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=rtol, atol=rtol * np.abs(expected).max() / 8)


RAGGED_CASES = [
    *(c for c in CASES if c.num_queries == 1 and c.window is None),
    Case(4, 2, 16, 8, 1, (3, 70, 40)),
    Case(4, 2, 16, 8, 67, (67, 67, 140), window=50, soft_cap=0.5),
    Case(4, 2, 16, 8, 67, (67, 67, 140), window=50, has_sinks=True),
]


@pytest.mark.parametrize(("name", "dtype", "case"), runs(RAGGED_CASES))
def test_ragged_sequences_match_the_formula(name: str, dtype: str, case: Case):
    """Of each sequence another number of its last tokens asks, of the second none; four tokens are padding."""
    arrays = make(case)
    counts = [0 if i == 1 else min(length, 1 + 33 * i) for i, length in enumerate(case.lengths)]
    num_tokens = sum(counts) + 4
    q = np.random.default_rng(1).normal(size=(num_tokens, case.num_q_heads, case.head_dim)).astype(np.float32)
    pools = {k: jnp.array(arrays[k]).astype(dtype) for k in ("k_pages", "v_pages")}
    starts = np.array(case.lengths, np.int32) - counts
    sinks = {"sinks": arrays["sinks"]} if case.has_sinks else {}
    attend = jax.jit(functools.partial(backend(name, case.spec).ragged_paged_attention, spec=case.spec, **sinks))
    ids = {"block_tables": arrays["block_tables"], "starts": starts, "lengths": np.array(counts, np.int32)}
    out = attend(jnp.array(q).astype(dtype), **pools, **ids)
    assert out.dtype == dtype and out.shape == q.shape
    end, rtol = 0, TOLERANCES[dtype]
    for row, (start, count) in enumerate(zip(starts, counts, strict=True)):
        of_sequence = slice(end, end := end + count)
        asked = np.asarray(jnp.array(q[None, of_sequence]).astype(dtype), np.float64)
        table, positions = arrays["block_tables"][row : row + 1], np.arange(start, start + count)[None]
        wide = {k: np.asarray(v, np.float64) for k, v in pools.items()}
        expected = reference(case, asked, **wide, block_tables=table, positions=positions, **sinks)[0]
        atol = rtol * np.abs(expected).max(initial=0) / 8
        np.testing.assert_allclose(np.asarray(out[of_sequence], np.float64), expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", running())
@pytest.mark.parametrize("case", [Case(8, 1, 48, 16, 1, (5, 90, 33)), Case(8, 2, 32, 16, 40, (40, 150))], ids=str)
def test_values_that_are_the_first_of_the_keys(name: str, case: Case):
    """As with pages of values that are copies of the keys."""
    module, dim = backend(name, case.spec), 16
    arrays = {k: jnp.array(v) for k, v in make(case).items() if k != "v_pages"}
    spec = dataclasses.replace(case.spec, value_dim=dim)
    expected = module.paged_attention(v_pages=arrays["k_pages"], spec=case.spec, **arrays)[..., :dim]
    out = module.paged_attention(v_pages=None, spec=spec, **arrays)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    q, positions = arrays.pop("q"), arrays.pop("positions")
    ragged = {"starts": positions[:, 0], "lengths": jnp.full(len(q), case.num_queries, jnp.int32)}
    out = module.ragged_paged_attention(q.reshape(-1, *q.shape[2:]), v_pages=None, spec=spec, **arrays, **ragged)
    np.testing.assert_allclose(out.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize("value_dim", [None, 8])
def test_pages_of_values_there_or_not_as_the_spec_says(value_dim: int | None):
    arrays = {k: jnp.array(v) for k, v in make(CASES[0]).items()}
    v_pages = arrays.pop("v_pages")
    spec = dataclasses.replace(CASES[0].spec, value_dim=value_dim)
    with pytest.raises(ValueError, match=r"v_pages is (None|given); expected the other for AttentionSpec"):
        backend("xla").paged_attention(v_pages=v_pages if value_dim else None, spec=spec, **arrays)


@pytest.mark.parametrize("name", running())
@pytest.mark.parametrize("has_sinks", [False, True])
def test_a_query_that_sees_nothing_gets_zeros_and_disturbs_nobody(name: str, has_sinks: bool):
    """In a group with others, and where a whole group sees nothing."""
    case = dataclasses.replace(CASES[0], has_sinks=has_sinks)
    arrays = {k: jnp.array(v) for k, v in make(case).items()}
    attend = functools.partial(backend(name, case.spec).paged_attention, spec=case.spec)
    whole = np.asarray(attend(**arrays))
    for idle in ([1], [0, 1, 2], [0, 1, 2, 3]):
        out = np.asarray(attend(**arrays | {"positions": arrays["positions"].at[jnp.array(idle)].set(-1)}))
        assert not out[idle].any()
        np.testing.assert_array_equal(np.delete(out, idle, 0), np.delete(whole, idle, 0))


@pytest.mark.parametrize("name", running())
def test_what_is_not_finite_stays_in_its_sequence(name: str):
    case = Case(4, 2, 16, 8, 1, (30, 30, 30))
    arrays = {k: jnp.array(v) for k, v in make(case).items()}
    attend = functools.partial(backend(name, case.spec).ragged_paged_attention, spec=case.spec)
    ids = {"block_tables": arrays["block_tables"], "starts": jnp.array([10, 20, 25]), "lengths": jnp.array([20, 10, 5])}
    q = jax.random.normal(jax.random.key(0), (40, 4, 16))
    whole = np.asarray(attend(q, arrays["k_pages"], arrays["v_pages"], **ids))
    poisoned = arrays["v_pages"].at[arrays["block_tables"][1, 0]].set(jnp.nan)
    out = np.asarray(attend(q, arrays["k_pages"], poisoned, **ids))
    assert np.isnan(out[20:30]).all()
    np.testing.assert_array_equal(np.delete(out, slice(20, 30), 0), np.delete(whole, slice(20, 30), 0))


@pytest.mark.parametrize("name", running())
@pytest.mark.parametrize(("case", "dtype"), [(CASES[8], "float32"), (CASES[10], "bfloat16")], ids=str)
def test_parts_over_three_devices_make_up_the_whole(name: str, dtype: str, case: Case):
    """Rows and ragged sequences over the pages that fall on each device, where the backend has parts."""
    spec = dataclasses.replace(case.spec, context_size=3)
    module = backend(name, case.spec)
    if module.unsupported(spec):
        return
    arrays = {k: jnp.array(v) for k, v in make(case).items()}
    arrays |= {k: arrays[k].astype(dtype) for k in ("q", "k_pages", "v_pages")}
    q, tables, positions, sinks = (arrays.get(k) for k in ("q", "block_tables", "positions", "sinks"))
    assert q is not None and tables is not None and positions is not None
    expected = np.asarray(module.paged_attention(**arrays, spec=case.spec), np.float64)
    devices = range(3)
    of_device = functools.partial(own_pages, jnp.where(tables, tables + 2, 0), ("context",))  # 2: scratch pages more
    rows, columns = jax.vmap(of_device, axis_name="context", axis_size=len(devices))()
    padded = [jnp.pad(arrays[k], ((2, 3), (0, 0), (0, 0), (0, 0))) for k in ("k_pages", "v_pages")]
    pools = [[pages[d::3] for pages in padded] for d in devices]
    merged = jax.vmap(lambda part: merge(part, ("context",), sinks, q.dtype), axis_name="context")
    asked = (q.reshape(-1, *q.shape[2:]), positions[:, 0], jnp.full(len(q), case.num_queries, jnp.int32))
    of_rows = jax.jit(functools.partial(module.partial_paged_attention, spec=spec))
    of_ragged = jax.jit(functools.partial(module.ragged_partial_paged_attention, spec=spec))
    own = [of_rows(q, *pools[d], rows[d], columns[d], positions) for d in devices]
    ragged = [of_ragged(asked[0], *pools[d], rows[d], columns[d], *asked[1:]) for d in devices]
    rtol = TOLERANCES[dtype]
    for parts in (own, ragged):
        for out in merged(jax.tree.map(lambda *x: jnp.stack(x), *parts)):
            out = np.asarray(out, np.float64).reshape(expected.shape)
            np.testing.assert_allclose(out, expected, rtol=rtol, atol=rtol * np.abs(expected).max() / 8)


@pytest.mark.parametrize(("key", "wrong"), [("columns", (3, 4)), ("dtype", "int16")])
def test_columns_that_do_not_fit_the_block_tables_are_refused(key: str, wrong: Any):
    case, arrays = CASES[0], {k: jnp.array(v) for k, v in make(CASES[0]).items()}
    columns = jnp.zeros(wrong, jnp.int32) if key == "columns" else arrays["block_tables"].astype(wrong)
    with pytest.raises(ValueError, match=r"columns (has shape|is int16)"):
        backend("xla").partial_paged_attention(**arrays, columns=columns, spec=case.spec)


def test_causal_attention_is_paged_attention_over_a_whole_prompt():
    """What trains the demonstration model against what serves it."""
    case = Case(8, 2, 16, 4, 12, (12, 12))
    arrays = {k: jnp.array(v) for k, v in make(case).items()}
    pages = arrays["block_tables"][:, :3]  # 12 tokens

    def contiguous(pool: jax.Array) -> jax.Array:
        return pool[pages].swapaxes(2, 3).reshape(2, 12, 2, 16)

    q, k, v = arrays["q"], contiguous(arrays["k_pages"]), contiguous(arrays["v_pages"])
    served = backend("xla", case.spec).paged_attention(**arrays, spec=case.spec)
    np.testing.assert_allclose(causal_attention(q, k, v, case.spec.scale), served, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("name", running())
@pytest.mark.parametrize("key", ["k_pages", "v_pages", "block_tables", "positions"])
def test_wrong_dtypes_are_refused(name: str, key: str):
    case = CASES[0]
    arrays = {k: jnp.array(v) for k, v in make(case).items()}
    arrays[key] = arrays[key].astype("bfloat16" if "pages" in key else "int16")
    with pytest.raises(ValueError, match=f"{key} is "):
        backend(name, case.spec).paged_attention(**arrays, spec=case.spec)


def test_heads_that_cannot_be_grouped_are_refused():
    with pytest.raises(ValueError, match="num_q_heads 6 is not a multiple of num_kv_heads 4"):
        AttentionSpec(num_q_heads=6, num_kv_heads=4, head_dim=8, page_size=4, scale=1.0)


@pytest.mark.parametrize("name", running())
@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("q", (4, 1, 8, 17), "q has shape"),
        ("k_pages", (13, 2, 5, 16), "k_pages has shape"),
        ("v_pages", (12, 2, 4, 16), "v_pages has shape"),
        ("block_tables", (3, 4), "block_tables has shape"),
        ("sinks", (2,), "sinks has shape"),
    ],
)
def test_wrong_shapes_are_refused(name: str, key: str, shape: tuple[int, ...], message: str):
    case = dataclasses.replace(CASES[0], has_sinks=True)
    arrays = {k: jnp.array(v) for k, v in make(case).items()}
    arrays[key] = jnp.zeros(shape, arrays[key].dtype)
    with pytest.raises(ValueError, match=message):
        backend(name, case.spec).paged_attention(**arrays, spec=case.spec)


@dataclasses.dataclass(frozen=True)
class Device:
    platform: str
    device_kind: str
    compute_capability: str | None = None


@pytest.mark.parametrize(
    ("device", "head_dim", "choice"),
    [
        (Device("cpu", "cpu"), 64, f"xla (cpu cannot: {reason})" if (reason := build.unavailable()) else "cpu"),
        (Device("gpu", "NVIDIA H100", "9.0"), 64, "triton"),
        (Device("gpu", "NVIDIA B200", "10.0"), 80, "triton"),
        (
            Device("gpu", "NVIDIA H100", "9.0"),
            40,
            "xla (triton cannot: it multiplies by 16 numbers at once, and a head_dim of 40 is no multiple of that)",
        ),
        (
            Device("gpu", "Tesla T4", "7.5"),
            64,
            "xla (triton cannot: it is for GPUs of compute capability 8.0 or more, and Tesla T4 has 7.5)",
        ),
        (
            Device("gpu", "AMD MI300X", "gfx942"),
            64,
            "xla (triton cannot: it is for NVIDIA GPUs, and this is AMD MI300X)",
        ),
    ],
    ids=str,
)
def test_the_preferred_one_that_can_is_chosen_and_the_others_say_why_not(device: Any, head_dim: int, choice: str):
    specs = [AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=h, page_size=16, scale=1.0) for h in (64, head_dim)]
    assert str(choose(specs, device)) == choice
    if "triton cannot" in choice:
        with pytest.raises(ValueError, match="--attention_backend=triton: it "):
            backend("triton", *specs, device=device)


def test_random_sequences():
    """Of lengths from nothing on, rows and ragged ones, whose pages lie anywhere, in one compiled program each."""
    case = Case(8, 2, 16, 4, 1, (90,) * 6, window=37, soft_cap=3.0)
    attend = {
        name: jax.jit(functools.partial(getattr(triton, name), spec=case.spec))
        for name in ("paged_attention", "ragged_paged_attention")
    }
    for seed in range(40 if IS_LONG else 12):
        rng = np.random.default_rng(seed)
        lengths = rng.integers(1, 91, 6)
        arrays = make(dataclasses.replace(case, lengths=(*map(int, lengths[:-1]), 90)), seed)
        asked = rng.random(6) < 0.8
        arrays["positions"][~asked] = -1
        expected = np.zeros(arrays["q"].shape)
        of_asked = {k: v if k in ("k_pages", "v_pages") else v[asked] for k, v in arrays.items()}
        expected[asked] = reference(case, **of_asked)
        out = attend["paged_attention"](**arrays)
        np.testing.assert_allclose(out, expected, atol=2e-5)
        ids = {"starts": arrays["positions"][:, 0], "lengths": asked.astype(np.int32)}
        q = np.concatenate([arrays["q"][asked, 0], arrays["q"][~asked, 0]])
        pools = {k: arrays[k] for k in ("k_pages", "v_pages", "block_tables")}
        out = attend["ragged_paged_attention"](q, **pools, **ids)
        np.testing.assert_allclose(out[: asked.sum()], expected[asked, 0], atol=2e-5)
        assert not np.asarray(out[asked.sum() :]).any()


def test_an_unknown_backend_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"--attention_backend=magic: no such backend; known: auto, cpu, mosaic_gpu, triton, xla"
    ):
        backend("magic", CASES[0].spec)


def test_write_puts_tokens_at_their_positions():
    """page_size 4, pages 7 and 2, positions 3 and 4: page 7 row 3 and page 2 row 0; the third is padding."""
    pages = jnp.zeros((9, 1, 4, 2))
    new = jnp.arange(1.0, 7.0).reshape(3, 1, 2)
    page_ids, positions = jnp.array([7, 2, 0], jnp.int32), jnp.array([3, 4, 1], jnp.int32)
    out = np.asarray(kv_cache.write(pages, new, page_ids, positions))
    assert out[7, 0, 3].tolist() == [1, 2] and out[2, 0, 0].tolist() == [3, 4]
    assert out[0, 0, 1].tolist() == [5, 6]
    assert np.count_nonzero(out) == 6


def test_sizes_are_for_the_device_of_the_spec_wherever_that_is():
    """A plan, or a program compiled for GPUs, is often made on a machine without any."""
    module = backend("xla")
    unknown = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=16, scale=1.0)
    on_cpu, on_gpu = (dataclasses.replace(unknown, device_kind=kind) for kind in ("cpu", "NVIDIA H100 80GB HBM3"))
    sizes = [(module.block_tokens(4096, s), module.group_rows(32, s), module.tile_tokens(s)) for s in (on_cpu, on_gpu)]
    assert sizes == [(64, 2, 32), (4096, 32, 128)]
    is_cpu = jax.default_backend() == "cpu"
    assert unknown.is_on_cpu == is_cpu
