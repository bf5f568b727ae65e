"""Programs on disk: found again, and never run unless they are as they were written, here."""

import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache as jax_cache_of_jax

from jaxinfer import compilation_cache, program_store
from jaxinfer.compilations import compile_program
from jaxinfer.partitioning import Partitioner
from jaxinfer.program_store import ProgramStore
from jaxinfer.programs import Program
from tests import tiny_model


def program(factor: float = 2.0, num_rows: int = 4, mesh: str = "") -> Program:
    """Multiplies two arrays, of which it takes the first over."""
    sharding = Partitioner.create(mesh).row_sharding((num_rows, 8))
    array = jax.ShapeDtypeStruct((num_rows, 8), jnp.float32, sharding=sharding)
    function = lambda pair: {"product": factor * pair[0] * pair[1], "sum": pair[0] + pair[1]}  # noqa: E731
    outputs = {"product": sharding, "sum": sharding}
    return Program(
        name="test", settings=repr((factor, mesh)), function=function, arguments=((array, array),), outputs=outputs
    )


def run(compiled: jax.stages.Compiled, of: Program) -> np.ndarray:
    (pair,) = jax.tree.map(lambda a: jax.device_put(np.full(a.shape, 3, a.dtype), a.sharding), of.arguments)
    found = compiled(pair)
    assert np.all(np.asarray(found["sum"]) == 6)
    return np.asarray(found["product"])


@pytest.fixture
def store(tmp_path: pathlib.Path) -> ProgramStore:
    return ProgramStore(tmp_path)


def saved(store: ProgramStore, of: Program) -> pathlib.Path:
    """The file of a program that was compiled and kept."""
    before = {*store._files._directory.iterdir()}
    with compilation_cache.without_cache:
        store.save(of, of.lower().compile())
    (path,) = {*store._files._directory.iterdir()} - before
    return path


@pytest.mark.parametrize("mesh", ["", "data:4", "data:2,tensor:4"])
def test_a_program_is_found_again(store: ProgramStore, mesh: str):
    of = program(mesh=mesh)
    assert store.load(of) is None
    saved(store, of)
    loaded = ProgramStore(store._files._directory).load(program(mesh=mesh))
    assert loaded is not None and np.all(run(loaded, of) == 18)


@pytest.mark.parametrize(
    "other", [program(factor=3.0), program(num_rows=8), program(mesh="data:2")], ids=["settings", "shape", "mesh"]
)
def test_other_programs_are_others(store: ProgramStore, other: Program):
    saved(store, program())
    assert store.load(other) is None


def test_what_decides_beside_the_program(store: ProgramStore, monkeypatch: pytest.MonkeyPatch):
    of, environment = program(), program_store._environment
    client = of.devices[0].client
    before = environment(client)
    monkeypatch.setenv("XLA_FLAGS", f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_enable_fast_math=true")
    assert environment(client) != before
    monkeypatch.undo()
    assert environment(client) == before
    monkeypatch.setattr(program_store, "_source_digest", lambda: "of an edited file")
    assert environment(client) != before
    json.dumps(before)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "renamed", "of another secret"])
def test_what_is_not_as_it_was_written_is_never_looked_at(
    store: ProgramStore, damage: str, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
):
    of = program()
    path = saved(store, of)
    content = path.read_bytes()
    if damage == "flip":
        path.write_bytes(content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "cut":
        path.write_bytes(content[:-1])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "renamed":
        saved(store, program(factor=3.0)).replace(path)
    else:
        path.write_bytes(saved(ProgramStore(tmp_path_factory.mktemp("foreign")), of).read_bytes())

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("it was loaded")

    with monkeypatch.context() as patch:
        patch.setattr(serialize_executable, "deserialize_and_load", load)
        assert store.load(of) is None
    path.unlink()
    saved(store, of)
    assert store.load(of) is not None, "it is written anew"


def test_a_file_that_jax_cannot_load_is_compiled_anew(store: ProgramStore, monkeypatch: pytest.MonkeyPatch):
    of = program()
    saved(store, of)
    monkeypatch.setattr(serialize_executable, "deserialize_and_load", lambda *_, **__: 1 / 0)
    assert store.load(of) is None


@pytest.mark.parametrize("mode", [0o770, 0o702])
def test_a_directory_that_others_may_write_to_is_refused(tmp_path: pathlib.Path, mode: int):
    tmp_path.chmod(mode)
    with pytest.raises(ValueError, match=f"others may write to {tmp_path}; run chmod go-w {tmp_path}"):
        ProgramStore(tmp_path)


def test_a_directory_of_somebody_else_is_refused(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ValueError, match="belongs to another user"):
        ProgramStore(tmp_path)


def test_the_secret_is_this_users_alone(store: ProgramStore):
    path = store._files._directory / "secret"
    assert path.stat().st_mode & 0o077 == 0 and len(path.read_bytes()) == 32
    assert ProgramStore(store._files._directory)._files._secret == store._files._secret


def test_what_is_there_is_read_where_nothing_may_be_written(store: ProgramStore, monkeypatch: pytest.MonkeyPatch):
    """As in a home that is full, or read-only. For the superuser nothing is forbidden, so it is said here."""
    saved(store, program(factor=3.0))
    denied = PermissionError(13, "denied")
    for owner, name in (
        (os, "link"),
        (os, "utime"),
        (tempfile, "NamedTemporaryFile"),
        (tempfile, "TemporaryDirectory"),
    ):
        monkeypatch.setattr(owner, name, lambda *_, **__: (_ for _ in ()).throw(denied))
    assert ProgramStore(store._files._directory).load(program(factor=3.0)) is not None


def test_those_that_were_not_used_go_first(tmp_path: pathlib.Path):
    of = [program(factor=float(i)) for i in range(4)]
    size = saved(ProgramStore(tmp_path), of[0]).stat().st_size
    store = ProgramStore(tmp_path, most_bytes=int(3.5 * size))
    paths = [next(tmp_path.glob("*.program")), *(saved(store, of[i]) for i in (1, 2))]
    for age, path in enumerate(paths):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert store.load(of[2]) is not None  # the oldest, which is used now
    with compilation_cache.without_cache:
        store.save(of[3], of[3].lower().compile())
    assert [store.load(each) is not None for each in of] == [True, False, True, True]


def test_a_disk_that_is_full_costs_the_file_and_not_the_run(store: ProgramStore, monkeypatch: pytest.MonkeyPatch):
    def write_bytes(self: pathlib.Path, content: bytes) -> int:
        raise OSError(28, "No space left on device")

    of = program()
    monkeypatch.setattr(pathlib.Path, "write_bytes", write_bytes)
    store.save(of, of.lower().compile())
    assert [path.name for path in store._files._directory.iterdir()] == ["secret"]


@pytest.fixture
def jax_cache(tmp_path: pathlib.Path) -> Iterator[None]:
    """Of JAX, in the directory; and ours."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: jax.config.values[name] for name in names}
    assert compilation_cache.use_compilation_cache(str(tmp_path / "cache")) is None
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax_cache_of_jax.reset_cache()  # or it goes on with the directory that it has
    yield
    compilation_cache.keep_no_programs()
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache_of_jax.reset_cache()


def test_what_jax_had_in_its_cache_is_not_kept(jax_cache: None):
    """It would be kept without its functions, and fail in the process that loads it."""
    hits: list[str] = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith("hits") else None)
    for num_hits in range(2):
        program().lower().compile()
        assert len(hits) == num_hits
    hits.clear()
    for _ in range(2):  # compiled, and loaded
        assert np.all(run(compile_program(of := program()), of) == 18) and not hits


START = """
import collections, sys
import jax
events = collections.Counter()
jax.monitoring.register_event_duration_secs_listener(
    lambda event, _, **about: events.update([event.rpartition("/")[2] + ":" + str(about.get("fun_name"))]))
from jaxinfer.compilation_cache import use_compilation_cache
use_compilation_cache(sys.argv[1])
from jaxinfer import Engine, SamplingParams
with Engine(sys.argv[2], max_num_seqs=1, max_model_len=64, max_num_batched_tokens=32, decode_steps=4) as engine:
    (output,) = engine.generate(["abc"], SamplingParams(max_tokens=8, ignore_eos=True))
    events = dict(events)
import json
print(json.dumps([output.outputs[0].token_ids, events]))
"""


def test_a_second_start_traces_lowers_and_compiles_nothing(tmp_path: pathlib.Path):
    """But for the shapes of the model's parameters, which are traced and not compiled. Tokens are the same."""
    directory, tokens, events = tiny_model.make(tmp_path / "tiny"), [], {}
    environment = os.environ | {"PYTHONPATH": str(pathlib.Path(__file__).parents[1])}
    for _ in range(2):
        command = [sys.executable, "-c", START, str(tmp_path / "cache"), str(directory)]
        result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        found, events = json.loads(result.stdout.splitlines()[-1])
        tokens.append(found)
    assert tokens[0] == tokens[1] and len(tokens[0]) == 8
    assert events == {"jaxpr_trace_duration:make": 1}
