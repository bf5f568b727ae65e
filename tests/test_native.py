"""Kernels in C++ for this machine's CPU: compiled once, never from what somebody else wrote, and not at all costs."""

import concurrent.futures
import dataclasses
import functools
import pathlib
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxinfer.partitioning import Partitioner
from pallas_kernels import matmul
from pallas_kernels.native import build
from pallas_kernels.paged_attention import AttentionSpec, backend, choose, cpu
from pallas_kernels.paged_attention.pages import QuantizedPages

SPEC = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=16, page_size=16, scale=0.25)
CPU = jax.devices("cpu")[0]

needs_compiler = pytest.mark.skipif(cpu.unsupported(SPEC, CPU) is not None, reason="there is no C++ compiler here")


@pytest.fixture
def fresh(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    """Where kernels are kept; nothing is yet."""
    monkeypatch.setattr(build, "DIRECTORY", str(tmp_path / "native"))
    monkeypatch.setattr(build, "_unavailable", build._unavailable.__wrapped__)  # which remembers nothing
    monkeypatch.setattr(jax.ffi, "register_ffi_target", lambda *_, **__: None)  # it has them, of another library
    return tmp_path / "native"


def kept(directory: pathlib.Path) -> list[pathlib.Path]:
    return sorted(directory.glob("*.so"))


def test_they_compile_wherever_there_is_a_compiler():
    """Or all tests of them would be skipped."""
    try:
        build._compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    assert build.unavailable() is None


@needs_compiler
def test_a_second_start_compiles_nothing(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    assert build.takes_time()
    assert build.unavailable() is None and not build.takes_time()
    (path,) = kept(fresh)
    assert fresh.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(build, "_compile", lambda: pytest.fail("it is compiled again"))
    assert build.unavailable() is None and kept(fresh) == [path]


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b[:-9] + b"damaged!!", lambda b: b"\x7fELF" + b])
def test_what_is_not_as_it_was_written_is_compiled_anew(
    fresh: pathlib.Path, damage: Callable[[bytes], bytes], monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr(build, "_compile", lambda: b"what the compiler makes")
    build._library()
    (path,) = kept(fresh)
    path.write_bytes(damage(content := path.read_bytes()))
    assert build._library() == b"what the compiler makes" and path.read_bytes() == content
    assert f"{path} is damaged, or was not written here" in caplog.text


def test_what_decides_what_is_compiled(monkeypatch: pytest.MonkeyPatch):
    keys = {build._key()}
    monkeypatch.setattr(build, "cpu_features", lambda: "flags: of another machine")
    keys.add(build._key())
    monkeypatch.setattr(build, "_FLAGS", ("-O0",))
    keys.add(build._key())
    monkeypatch.setattr(build, "_FOLDER", build._FOLDER.parent / "paged_attention")  # other sources: none
    keys.add(build._key())
    assert len(keys) == 4


@pytest.mark.parametrize("is_file", [False, True])
def test_without_a_directory_it_is_compiled_at_each_start(
    fresh: pathlib.Path, is_file: bool, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setattr(build, "_compile", lambda: b"what the compiler makes")
    if is_file:
        fresh.write_text("in the way")
    else:
        fresh.mkdir(mode=0o777)
        fresh.chmod(0o777)
    assert build._library() == b"what the compiler makes"
    assert "kernels for this CPU are compiled anew at each start: " in caplog.text and kept(fresh) == []


def test_a_home_that_cannot_be_searched_is_no_error(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    """As for a user whose HOME is somebody else's. For the superuser nothing is forbidden, so it is said here."""
    monkeypatch.setattr(pathlib.Path, "exists", lambda path: (_ for _ in ()).throw(PermissionError(13, "denied")))
    assert build.takes_time()


@needs_compiler
def test_threads_that_ask_at_once_compile_once(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(build, "_unavailable", functools.cache(build._unavailable))
    compile_once, calls = build._compile, []
    monkeypatch.setattr(build, "_compile", lambda: calls.append(1) or compile_once())
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert [*pool.map(lambda _: build.unavailable(), range(4))] == [None] * 4
    assert calls == [1]


@pytest.mark.parametrize(
    ("compiler", "reason"),
    [
        ("no_such_compiler", "No such file or directory: 'no_such_compiler'"),
        ("false", "false cannot compile kernels.cc: "),
        ("sh -c 'echo error: of many >&2; exit 1'", "sh cannot compile kernels.cc: error: of many"),
    ],
)
def test_a_compiler_that_cannot_leaves_it_to_xla(
    fresh: pathlib.Path, compiler: str, reason: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("CXX", compiler)
    choice = choose([SPEC], CPU)
    assert choice.name == "xla" and reason in choice.passed_over["cpu"] and "\n" not in str(choice)
    with pytest.raises(ValueError, match="--attention_backend=cpu: "):
        backend("cpu", SPEC, device=CPU)
    with pytest.raises(RuntimeError, match="or use --attention_backend=xla"):
        attend(np.zeros((1, 4, 16), np.float32), np.zeros((1, 2, 16, 16), np.float32), np.arange(1))
    assert kept(fresh) == []


def test_without_a_compiler_it_says_what_to_install(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert cpu.unsupported(SPEC, CPU) == "there is no C++ compiler: install g++, or name one in CXX"


def test_elsewhere_than_on_linux_it_is_left_to_xla(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(build.os, "memfd_create")
    assert cpu.unsupported(SPEC, CPU) == "it needs Linux" and not build.takes_time()


def test_a_compiler_that_hangs_is_ended(fresh: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "sh -c 'exec sleep 60'")
    monkeypatch.setattr(build, "_TIMEOUT_S", 0.1)
    assert cpu.unsupported(SPEC, CPU) == "sh was not done with kernels.cc after 0.1 s"


def attend(q, pages, positions, spec: AttentionSpec = SPEC, v_pages=None, table=(0, 1, 2, 3)) -> np.ndarray:
    """A prompt's tokens one after the other, of the sequence whose pages are `table`."""
    sequence = [jnp.asarray(a, jnp.int32) for a in ([table], positions[:1], [len(positions)])]
    pools = pages, pages if v_pages is None else v_pages
    return np.asarray(cpu.ragged_paged_attention(q, *pools, *sequence, spec=spec))


@needs_compiler
@pytest.mark.parametrize("other", [{}, {"window": 37}, {"soft_cap": 3.0}])
def test_a_query_gets_the_same_bits_whatever_is_beside_it(other: dict[str, float]):
    """So tokens do not depend on how a prompt is cut, and those of a batch are those of one alone."""
    rng = np.random.default_rng(0)
    spec = AttentionSpec(num_q_heads=6, num_kv_heads=2, head_dim=40, page_size=16, scale=0.2, **other)
    q = rng.standard_normal((170, 6, 40), np.float32)
    pages = rng.standard_normal((12, 2, 16, 40), np.float32)
    table, positions = rng.permutation(12), np.arange(170)
    whole = attend(q, pages, positions, spec, table=table)
    for first, last in ((0, 1), (63, 66), (5, 170), (169, 170)):
        part = attend(q[first:last], pages, positions[first:last], spec, table=table)
        np.testing.assert_array_equal(part, whole[first:last])


@needs_compiler
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_each_number_of_16_bits_is_what_it_is(dtype: str):
    """A query that sees one token gets its values, infinities and NaN too. What float32 has as denormal may be zero."""
    bits = np.arange(2**16, dtype=np.uint16)
    values = jnp.asarray(bits.view(jnp.dtype(dtype)).reshape(-1, 2, 16, 16))
    keys, tables = jnp.zeros_like(values), np.arange(len(values), dtype=np.int32)[:, None]
    one = AttentionSpec(num_q_heads=2, num_kv_heads=2, head_dim=16, page_size=16, scale=1.0, window=1)
    q, tables = jnp.zeros((len(tables), 16, 2, 16), values.dtype), jnp.asarray(tables)
    positions = jnp.broadcast_to(jnp.arange(16, dtype=jnp.int32), (len(tables), 16))
    found = cpu.paged_attention(q, keys, values, tables, positions, spec=one)
    found, values = (x.astype(jnp.float32) for x in (found.transpose(0, 2, 1, 3), values))
    is_normal = ~(jnp.abs(values) < jnp.finfo(jnp.float32).tiny)
    np.testing.assert_array_equal(found, jnp.where(is_normal, values, 0))


@needs_compiler
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn"])
def test_each_number_of_8_bits_is_what_it_is(dtype: str):
    numbers = np.arange(2**8, dtype=np.uint8).view(jnp.dtype(dtype)).reshape(1, 1, 16, 16)
    values = QuantizedPages(jnp.asarray(numbers), jnp.full((1, 1, 16), 0.5, jnp.float32))
    one = AttentionSpec(
        num_q_heads=1, num_kv_heads=1, head_dim=16, page_size=16, scale=1.0, window=1, cache_dtype=dtype
    )
    keys = values._replace(values=jnp.zeros_like(values.values))
    positions = jnp.arange(16, dtype=jnp.int32)[None]
    q, table = jnp.zeros((1, 16, 1, 16), jnp.float32), jnp.zeros((1, 1), jnp.int32)
    found = cpu.paged_attention(q, keys, values, table, positions, spec=one)
    np.testing.assert_array_equal(found[0, :, 0], numbers[0, 0].astype(np.float32) / 2)


@needs_compiler
def test_nan_in_a_query_stays_with_it():
    q, pages = np.ones((20, 4, 16), np.float32), np.ones((4, 2, 16, 16), np.float32)
    q[7, 2] = np.nan
    found = attend(q, pages, np.arange(20))
    assert np.isnan(found[7, 2]).all() and np.isnan(found).sum() == 16


@needs_compiler
@pytest.mark.parametrize("window", [None, 9])
def test_nan_in_a_value_stays_with_those_that_see_it(window: int | None):
    spec = dataclasses.replace(SPEC, window=window)
    q, keys = np.ones((64, 4, 16), np.float32), np.ones((4, 2, 16, 16), np.float32)
    values = keys.copy()
    values[1, :, 4] = np.nan  # of token 20
    found = attend(q, keys, np.arange(64), spec, v_pages=values)
    sees = (np.arange(64) >= 20) & (np.arange(64) < 20 + (window or 64))
    np.testing.assert_array_equal(np.isnan(found), np.broadcast_to(sees[:, None, None], found.shape))


@needs_compiler
def test_scores_with_a_cap():
    """Two tokens' scores, the second 0: what comes out is the weight of the first."""
    scores = np.concatenate([np.linspace(-300, 300, 1001), np.geomspace(1e-6, 1, 50)]).astype(np.float32)
    spec = AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=16, page_size=16, scale=1.0, soft_cap=50.0)
    q, keys, values = np.zeros((len(scores), 1, 1, 16), np.float32), *np.zeros((2, 1, 1, 16, 16), np.float32)
    q[:, 0, 0, 0], keys[0, 0, 0, 0], values[0, 0, 0] = scores, 1, 1
    one = np.ones((len(scores), 1), np.int32)
    found = cpu.paged_attention(q, keys, values, jnp.asarray(0 * one), jnp.asarray(one), spec=spec)[:, 0, 0, 0]
    capped = 50 * np.tanh(scores.astype(np.float64) / 50)
    np.testing.assert_allclose(found, 1 / (1 + np.exp(-capped)), rtol=1e-5)


@needs_compiler
def test_scores_that_are_all_infinitely_low_leave_no_trace():
    """Those of a block, before others that are low, and lower than e^x can be."""
    q, keys = np.ones((1, 4, 16), np.float32), np.full((8, 2, 16, 16), -np.inf, np.float32)
    keys[4:] = -50  # a score of -200
    found = attend(q, keys, np.array([127]), v_pages=np.ones_like(keys), table=range(8))
    np.testing.assert_allclose(found, 1, rtol=1e-6)


@needs_compiler
def test_scores_far_apart():
    """The largest has all the weight; of those below e^-87 nothing is left."""
    q, keys = np.ones((1, 4, 16), np.float32), np.zeros((4, 2, 16, 16), np.float32)
    values = np.ones_like(keys)
    keys[0, :, 5], values[0, :, 5] = 100, 7
    np.testing.assert_array_equal(attend(q, keys, np.array([40]), v_pages=values), np.full((1, 4, 16), 7))


@needs_compiler
@pytest.mark.parametrize("numbers_of_rows", [[*range(1, 9), 31, 32], [33, 47, 64]])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_with_any_weight(dtype: str, numbers_of_rows: list[int]):
    """Beside NumPy in float64, of sizes that no vector divides too. Rows give the same bits in any company."""
    rng = np.random.default_rng(0)
    for num_out, num_in in ((7, 5), (3, 16), (33, 200), (700, 129), (50, 2100)):
        x = jnp.asarray(rng.standard_normal((numbers_of_rows[-1], num_in)), dtype)
        weight = jnp.asarray(rng.standard_normal((num_out, num_in)), dtype)
        exact = np.asarray(x, np.float64) @ np.asarray(weight, np.float64).T
        with matmul.in_kernel(True):
            products = [matmul.contract(x[:n], weight, jnp.float32) for n in numbers_of_rows]
        np.testing.assert_allclose(products[-1], exact, rtol=1e-5, atol=1e-5 * np.abs(exact).max())
        for n, product in zip(numbers_of_rows, products, strict=True):
            assert product.dtype == jnp.float32
            np.testing.assert_array_equal(product, products[-1][:n])


@needs_compiler
def test_products_of_the_same_rows_are_those_of_each():
    rng = np.random.default_rng(1)
    x, *weights = (jnp.asarray(rng.standard_normal((n, 40), np.float32)) for n in (50, 3, 900, 8))
    with matmul.in_kernel(True):
        for rows in (x[:5], x):
            for product, weight in zip(matmul.contract_each(rows, weights), weights, strict=True):
                np.testing.assert_array_equal(product, matmul.contract(rows, weight))


@pytest.mark.parametrize("other", [jnp.ones((4, 16), jnp.bfloat16), jnp.ones((4, 17)), jnp.ones((4, 15))])
@needs_compiler
def test_weights_that_the_kernel_would_misread_are_refused(other: jax.Array):
    with matmul.in_kernel(True), pytest.raises(ValueError, match="for rows of 16 numbers: they must have one dtype"):
        matmul.contract_each(jnp.ones((1, 16)), [jnp.ones((4, 16)), other])


@needs_compiler
def test_products_are_a_kernels_only_where_they_can_be():
    """On one device; and rounded once to what the caller wants."""

    def text(num_rows: int, is_possible: bool, dtype: str = "float32") -> str:
        with matmul.in_kernel(is_possible):
            x, weight = jnp.ones((num_rows, 1, 16), dtype), jnp.ones((4, 16), dtype)
            return jax.jit(lambda x, weight: matmul.contract(x, weight)).lower(x, weight).as_text()

    assert "jaxinfer_matmul" in text(8, True) and "jaxinfer_matmul" in text(100, True, "bfloat16")
    assert "jaxinfer_matmul" not in text(8, False)
    one, two = (Partitioner.create(mesh) for mesh in ("", "tensor:2"))
    assert one.multiplies_in_kernel and not two.multiplies_in_kernel
    assert not Partitioner.abstract("").multiplies_in_kernel
    with matmul.in_kernel(True):
        assert matmul.contract(jnp.ones((1, 16), jnp.bfloat16), jnp.ones((4, 16), jnp.bfloat16)).dtype == jnp.bfloat16
