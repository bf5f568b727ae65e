"""Both ways between Hugging Face's safetensors and Orbax: the same bytes, and nothing half-written, whatever happens.

The long campaign: `JAXINFER_TEST_KILLS=50 JAXINFER_TEST_FLIPS=1000 pytest tests/test_conversion.py -s`
"""

import hashlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxinfer import Engine, SamplingParams, models
from jaxinfer.checkpoint import conversion, hf_writer, manifest, reader
from jaxinfer.parameters import ModelDefinition
from jaxinfer.partitioning import Partitioner
from jaxinfer.planner import format_bytes
from tests import tiny_model
from tests.command_line import environment
from tests.parity import driver, recipe

NUM_KILLS = int(os.environ.get("JAXINFER_TEST_KILLS", "2"))
NUM_FLIPS = int(os.environ.get("JAXINFER_TEST_FLIPS", "40"))


def write_source(directory: pathlib.Path, family: str = "llama") -> pathlib.Path:
    config = recipe.first_config(family)
    recipe.write_model(directory, config, recipe.weights(family, config))
    (directory / "generation_config.json").write_text('{"temperature": 0.5}')
    return directory


def convert(source: pathlib.Path, target: pathlib.Path, dtype: str = "auto") -> pathlib.Path:
    nothing = lambda done, total: None  # noqa: E731
    conversion.convert(conversion.Source.open(source, dtype), target, nothing)
    return target


def assert_same_tensors(first: pathlib.Path, second: pathlib.Path) -> None:
    before, after = (load_file(directory / "model.safetensors") for directory in (first, second))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert (tensor.dtype, tensor.shape) == (after[name].dtype, after[name].shape), name
        assert tensor.tobytes() == after[name].tobytes(), name


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return write_source(tmp_path_factory.mktemp("source") / "model")


@pytest.fixture(scope="module")
def converted(source: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    return convert(source, tmp_path_factory.mktemp("converted") / "model")


@pytest.mark.parametrize("family", models.families())
def test_there_and_back_gives_the_same_bytes(family: str, tmp_path: pathlib.Path):
    """Fused tensors too, which are apart in between."""
    source = write_source(tmp_path / "source", family)
    back = convert(convert(source, tmp_path / "orbax"), tmp_path / "back")
    assert_same_tensors(source, back)
    for name in ("config.json", "generation_config.json"):
        assert (back / name).read_bytes() == (source / name).read_bytes()


def test_dtypes_are_kept_tensor_by_tensor(tmp_path: pathlib.Path):
    source = write_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    mixed = {k: v if "norm" in k else v.astype("float16") for k, v in tensors.items()}
    save_file(mixed, source / "model.safetensors")
    assert_same_tensors(source, convert(convert(source, tmp_path / "orbax"), tmp_path / "back"))


def test_another_dtype_is_rounded_once(source: pathlib.Path, tmp_path: pathlib.Path):
    convert(convert(source, tmp_path / "orbax", "float16"), tmp_path / "back")
    before, after = (load_file(directory / "model.safetensors") for directory in (source, tmp_path / "back"))
    for name, tensor in before.items():
        np.testing.assert_array_equal(after[name], tensor.astype("float16"))


@pytest.mark.parametrize("mesh", ["", "tensor:2", "tensor:4", "data:2,tensor:4"])
def test_orbax_is_restored_onto_any_mesh(mesh: str, source: pathlib.Path, converted: pathlib.Path):
    """Over tensor:4 each of the two KV heads is on two devices."""
    definition, expected = driver.load(source, mesh)
    for spec, array, wanted in zip(
        definition.params, reader.load_weights(converted, definition), expected, strict=True
    ):
        assert array.sharding == wanted.sharding and array.dtype == wanted.dtype, spec.path
        np.testing.assert_array_equal(array, wanted, err_msg=spec.path)


def test_an_engine_runs_it(source: pathlib.Path, converted: pathlib.Path):
    outputs = []
    for directory in (source, converted):
        with Engine(str(directory), **tiny_model.ONE_SLOT) as engine:
            outputs.append(engine.generate([1, 2, 3], SamplingParams(temperature=0.0, max_tokens=8))[0].outputs[0])
    assert outputs[0].token_ids == outputs[1].token_ids


def test_files_of_a_large_model(source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hf_writer, "_MAX_FILE_BYTES", 50_000)
    back = convert(convert(source, tmp_path / "orbax"), tmp_path / "back")
    index = json.loads((back / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05}.safetensors"
    found = {name: tensor for file in files for name, tensor in load_file(back / file).items()}
    before = load_file(source / "model.safetensors")
    assert found.keys() == before.keys() and all(found[k].tobytes() == v.tobytes() for k, v in before.items())
    driver.load(back)


@pytest.mark.parametrize("direction", ["to orbax", "to safetensors"])
def test_a_killed_conversion_leaves_nothing_that_loads_and_goes_on(
    direction: str, source: pathlib.Path, converted: pathlib.Path, tmp_path: pathlib.Path
):
    start = source if direction == "to orbax" else converted
    command = [sys.executable, "-m", "jaxinfer.convert_checkpoint", f"--source={start}", "--nocheck"]

    def begin(target: pathlib.Path) -> subprocess.Popen[bytes]:
        """A conversion that has begun to write."""
        process = subprocess.Popen([*command, f"--target={target}"], stderr=subprocess.DEVNULL)
        while process.poll() is None and not target.with_name(f".{target.name}.partial").exists():
            time.sleep(0.005)
        return process

    process, start_time = begin(tmp_path / "whole"), time.perf_counter()
    while process.poll() is None and not (tmp_path / "whole").exists():
        time.sleep(0.005)
    seconds, rng, num_early, num_late = time.perf_counter() - start_time, random.Random(0), 0, 0
    assert process.wait() == 0
    while num_early < NUM_KILLS:
        target = tmp_path / f"target{num_early + num_late}"
        process = begin(target)
        time.sleep(seconds * rng.random())
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            num_late, seconds = num_late + 1, 0.8 * seconds  # the first run may have been slow
            assert num_late < 10 + NUM_KILLS
        else:
            num_early += 1
            subprocess.run([*command, f"--target={target}"], check=True, capture_output=True)
        manifest.verify(target)
        assert not list(tmp_path.glob(".*")), "a temporary directory is left"
        shutil.rmtree(target)
    print(f"{direction}: {num_early} kills while it wrote, 0 loadable halves, {num_early} second runs; {num_late} late")


@pytest.mark.parametrize("step", ["add", "finish"])
def test_it_goes_on_where_it_was_cut_short(
    step: str, source: pathlib.Path, converted: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(conversion, "_GROUP_BYTES", 1)
    original, calls = getattr(conversion.orbax_weights, step), []

    def cut_short(*args):
        calls.append(args)
        original(*args)
        if len(calls) == (5 if step == "add" else 1):
            raise KeyboardInterrupt  # after the work, before anybody can note it

    monkeypatch.setattr(conversion.orbax_weights, step, cut_short)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()
    convert(source, tmp_path / "target")
    if step == "add":
        num_params = len(conversion.Source.open(source).params)
        assert len(calls) == num_params + 1, "only the one in doubt is tried again"
    assert reader.load_weights(tmp_path / "target", driver.load(source)[0])
    assert_same_tensors(source, convert(tmp_path / "target", tmp_path / "back"))


def test_what_was_left_by_another_conversion_is_not_gone_on_from(source: pathlib.Path, tmp_path: pathlib.Path):
    partial = tmp_path / ".target.partial"
    partial.mkdir()
    (partial / "conversion.json").write_text('{"to": "elsewhere"}')
    (partial / "leftover").touch()
    assert not (convert(source, tmp_path / "target") / "leftover").exists() and not partial.exists()


@pytest.mark.parametrize("kind", ["orbax", "safetensors"])
def test_every_flipped_bit_is_found(kind: str, converted: pathlib.Path, tmp_path: pathlib.Path):
    directory = tmp_path / "model"
    if kind == "orbax":
        shutil.copytree(converted, directory)
    else:
        convert(converted, directory)
    manifest.verify(directory)
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.stat().st_size]
    rng, found = random.Random(0), 0
    for _ in range(NUM_FLIPS):
        path = rng.choices(files, [path.stat().st_size for path in files])[0]
        data = bytearray(path.read_bytes())
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        path.write_bytes(data)
        try:
            manifest.verify(directory)
        except ValueError as error:
            found += str(directory) in str(error)
        data[at] ^= bit
        path.write_bytes(data)
    print(f"{kind}: {found} of {NUM_FLIPS} flipped bits found")
    assert found == NUM_FLIPS
    manifest.verify(directory)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "COMPLETE").unlink(), "no COMPLETE; the directory is half of a conversion"),
        (lambda d: (d / "jaxinfer_manifest.json").unlink(), "Orbax weights without jaxinfer_manifest.json"),
        (
            lambda d: (d / "COMPLETE").write_text("0\n"),
            "is not the one that COMPLETE was written for",
        ),
        (lambda d: next((d / "weights" / "state").rglob("d/*")).unlink(), "is missing; jaxinfer_manifest.json says"),
        (lambda d: seal(d, "[1]"), "has version None; this program reads 1"),
        (lambda d: seal(d, '{"version": 1}'), "lacks files"),
        (lambda d: seal(d, '{"version": 1, "about": {"params": {}}, "files": {"../x": {}}}'), "lists '../x'"),
        (lambda d: seal(d, '{"version": 1, "about": {"params": {}, "format": "x"}, "files": {}}'), "says format 'x'"),
    ],
)
def test_what_is_not_whole_is_refused(damage, message: str, converted: pathlib.Path, tmp_path: pathlib.Path):
    definition = driver.load_definition(converted)
    shutil.copytree(converted, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        reader.load_weights(tmp_path / "model", definition)


def seal(directory: pathlib.Path, text: str) -> None:
    """Puts `text` in the manifest's place, as if it were ours."""
    (directory / manifest.MANIFEST).write_text(text)
    (directory / manifest.COMPLETE).write_text(hashlib.sha256(text.encode()).hexdigest())


def test_files_that_people_edit_may_be_edited(converted: pathlib.Path, tmp_path: pathlib.Path):
    shutil.copytree(converted, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text("{}")
    reader.load_weights(tmp_path / "model", driver.load_definition(converted))
    with pytest.raises(ValueError, match=r"generation_config\.json: its sha256 is"):
        manifest.verify(tmp_path / "model")


def test_what_a_source_lost_is_not_sealed_again(converted: pathlib.Path, tmp_path: pathlib.Path):
    shutil.copytree(converted, tmp_path / "model")
    path = max((tmp_path / "model" / "weights").rglob("d/*"), key=lambda path: path.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="its sha256 is"):
        convert(tmp_path / "model", tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_link_is_not_verified(converted: pathlib.Path, tmp_path: pathlib.Path):
    directory = shutil.copytree(converted, tmp_path / "model")
    (directory / "generation_config.json").rename(tmp_path / "outside.json")
    (directory / "generation_config.json").symlink_to(tmp_path / "outside.json")
    with pytest.raises(ValueError, match="is a link that leads out of the directory"):
        manifest.verify(directory)


def test_two_conversions_to_one_target_do_not_mix(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    refused: list[str] = []

    def second(*args):
        with pytest.raises(ValueError, match="another conversion writes to the same target") as error:
            convert(source, tmp_path / "target")
        refused.append(str(error.value))
        return add(*args)

    add = conversion.orbax_weights.add
    monkeypatch.setattr(conversion.orbax_weights, "add", second)
    manifest.verify(convert(source, tmp_path / "target"))
    assert refused


def test_numbers_beyond_float16_are_refused_in_either_format(tmp_path: pathlib.Path):
    source = write_source(tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1e6
    save_file(tensors, source / "model.safetensors")
    config = driver.load_definition(source).config
    definition = ModelDefinition.create(config, Partitioner.create(), jnp.dtype("float16"))
    for directory in (source, convert(source, tmp_path / "orbax")):
        with pytest.raises(ValueError, match="beyond float16's 65504"):
            reader.load_weights(directory, definition)


def test_orbax_weights_of_another_model_are_refused(converted: pathlib.Path, tmp_path: pathlib.Path):
    """Orbax would cut them to the shape that is asked for."""
    for change, message in (
        ({"num_hidden_layers": 3}, "missing 9 "),
        ({"num_hidden_layers": 1}, "left over 9 "),
        ({"vocab_size": 120}, r"embedding/table has shape \[128, 64\], expected \[120, 64\]"),
    ):
        directory = tmp_path / next(iter(change))
        shutil.rmtree(directory, ignore_errors=True)
        (recipe.write_model(directory, recipe.tiny_config("llama", "gqa") | change, {}) / "model.safetensors").unlink()
        definition = driver.load_definition(directory)
        with pytest.raises(ValueError, match=message):
            reader.load_weights(converted, definition)


def test_no_code_and_no_foreign_weights_come_along(source: pathlib.Path, tmp_path: pathlib.Path):
    directory = tmp_path / "source"
    shutil.copytree(source, directory)
    for name in ("modeling_x.py", "pytorch_model.bin", "training_args.bin", "run.sh"):
        (directory / name).write_text("print('never')")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    names = {path.name for path in convert(directory, tmp_path / "target").iterdir()}
    expected = {"COMPLETE", "chat_template.jinja", "config.json", "generation_config.json", "weights"}
    expected |= {manifest.MANIFEST}
    assert names == expected


def test_a_link_out_of_the_source_is_refused(source: pathlib.Path, tmp_path: pathlib.Path):
    directory, secret = tmp_path / "source", tmp_path / "secret.json"
    shutil.copytree(source, directory)
    secret.write_text("{}")
    (directory / "tokenizer_config.json").symlink_to(secret)
    with pytest.raises(ValueError, match="is a link that leads out of the directory"):
        convert(directory, tmp_path / "target")
    assert {path.name for path in tmp_path.iterdir()} == {"source", "secret.json"}


Usage = namedtuple("Usage", "total used free")


def test_a_disk_without_room_is_said_before_anything_is_written(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda path: Usage(10, 9, 1))
    with pytest.raises(ValueError, match=r"needs 0.00 GB more, and has 0.00 GB free"):
        convert(source, tmp_path / "target")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("place", ["/proc/model", "/sys/model"])
def test_a_place_that_takes_no_files_is_named(place: str, source: pathlib.Path):
    """Neither does, whoever asks."""
    with pytest.raises(OSError, match=f"'{pathlib.Path(place).parent}/"):
        convert(source, pathlib.Path(place))


@pytest.mark.parametrize("direction", ["to orbax", "to safetensors"])
def test_a_disk_that_fills_up_ends_in_one_line_and_leaves_nothing(
    direction: str, source: pathlib.Path, converted: pathlib.Path, tmp_path: pathlib.Path
):
    """Played by a limit on the size of a file."""
    start, limit = source if direction == "to orbax" else converted, 100_000
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    code += "from jaxinfer.convert_checkpoint import cli; cli()"
    command = [sys.executable, "-c", code, f"--source={start}", f"--target={tmp_path / 'target'}", "--nocheck"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), check=False)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("convert_checkpoint: error: ")
    assert not list(tmp_path.iterdir())
    assert "Traceback" not in done.stderr or direction == "to orbax"  # Orbax's own thread has a say before our line


def test_what_threads_write_after_an_error_goes_too(
    source: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    """Played by writing while the conversion waits for them."""
    num_pauses = [0]
    late = [tmp_path / ".target.partial" / "weights" / name for name in ("first", "second")]

    def fail(*_):
        raise OSError("full")

    def write_one():
        num_pauses[0] += 1
        if late and num_pauses[0] in (1, 3):
            late[0].parent.mkdir(parents=True)
            late.pop(0).touch()

    monkeypatch.setattr(conversion.orbax_weights, "add", fail)
    monkeypatch.setattr(conversion, "_pause", write_one)
    with pytest.raises(OSError, match="full"):
        convert(source, tmp_path / "target")
    assert not late and not list(tmp_path.iterdir())


def test_what_is_inspected_counts_repeated_kv_heads_on_each_device(source: pathlib.Path):
    mesh = "tensor:8"  # of 2 KV heads
    args = (f"--source={source}", "--inspect", f"--mesh={mesh}")
    command = [sys.executable, "-m", "jaxinfer.convert_checkpoint", *args]
    shown = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), check=True).stdout
    shard_bytes = conversion.Source.open(source, mesh=mesh).definition.shard_bytes
    assert f", {format_bytes(shard_bytes)} on each device" in shown


def test_the_command_line(source: pathlib.Path, tmp_path: pathlib.Path):
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "jaxinfer.convert_checkpoint", *args]
        return subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), check=False)

    done = run(f"--source={source}", f"--target={tmp_path / 'new'}")
    assert done.returncode == 0 and "checked: both directories generate the same 8 tokens" in done.stderr
    assert "peak host memory" in done.stderr and "largest tensor" in done.stderr
    shown = run(f"--source={tmp_path / 'new'}", "--inspect", "--mesh=tensor:2", "--verify")
    assert shown.returncode == 0 and "files are as they were written" in shown.stderr
    assert "layers/0/attention/q/weight  float32[8,16,64]  (heads,head_dim,embed) -> (tensor, -, -)" in shown.stdout
    for args, message in (
        ((f"--source={source}", f"--target={tmp_path / 'new'}"), "exists; name a new directory"),
        ((f"--source={source}", "--verify"), "no jaxinfer_manifest.json; convert_checkpoint writes one"),
        ((f"--source={source}",), "nothing to do: give --target, --inspect or --verify"),
        (("--inspect",), "--source is missing"),
        (("--source=/nowhere", "--inspect"), "--source=/nowhere: no such directory"),
    ):
        refused = run(*args)
        assert refused.returncode == 1
        assert refused.stderr.splitlines()[-1].startswith("convert_checkpoint: error: ") and message in refused.stderr
