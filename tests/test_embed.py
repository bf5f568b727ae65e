"""`Engine.embed`: what a user of an encoder sees, and what is refused."""

import json
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizers
from safetensors.numpy import save_file
from tokenizers import models, pre_tokenizers, processors

from jaxinfer import AsyncEngine, Engine, SamplingParams, resolve
from jaxinfer.models import bert
from tests import tiny_model
from tests.command_line import environment, run_here
from tests.parity import recipe

CONFIG = bert.TINY_CONFIGS["mha"] | {"max_position_embeddings": 32}
CLS, SEP = 101, 102
REFUSAL = "BertModel is an encoder: it has embeddings and generates nothing; use Engine.embed"


def make(directory: pathlib.Path, **changes: Any) -> pathlib.Path:
    config = CONFIG | changes
    recipe.write_model(directory, config, recipe.weights("bert", config))
    return directory


def write_tokenizer(directory: pathlib.Path) -> None:
    """Words, between [CLS] and [SEP]; like that of all-MiniLM-L6-v2 it asks for truncation and padding."""
    vocab = {"[PAD]": 0, "[UNK]": 1, "[CLS]": CLS, "[SEP]": SEP, "a": 5, "text": 6, "longer": 7}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", CLS), ("[SEP]", SEP)]
    )
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = make(tmp_path_factory.mktemp("bert") / "model")
    write_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def engine(model_dir: pathlib.Path):
    with Engine(str(model_dir), max_num_seqs=2) as engine:
        yield engine


def test_texts_and_token_ids(engine: Engine):
    vectors = engine.embed(["a text", [CLS, 5, 6, SEP], [CLS, 17, SEP]])
    assert vectors.shape == (3, 64) and vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-5)
    assert np.abs(vectors[0] - vectors[2]).max() > 0.1
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-6)


def test_one_prompt_is_a_matrix_of_one_row(engine: Engine):
    one = engine.embed("a text")
    assert one.shape == (1, 64)
    np.testing.assert_array_equal(one, engine.embed([CLS, 5, 6, SEP]))
    assert engine.embed([]).shape == (0, 64)


def test_a_tokenizer_that_asks_for_truncation_and_padding_gets_neither(engine: Engine):
    whole = engine.embed("a longer text a longer text")
    np.testing.assert_array_equal(whole, engine.embed([CLS, 5, 7, 6, 5, 7, 6, SEP]))


def test_a_vocabulary_without_tokenizer_json(tmp_path: pathlib.Path, engine: Engine):
    """As older directories have it: vocab.txt, a token per line."""
    words = {0: "[PAD]", 1: "[UNK]", CLS: "[CLS]", SEP: "[SEP]", 103: "[MASK]", 5: "a", 6: "text"}
    directory = make(tmp_path / "model")
    (directory / "vocab.txt").write_text("".join(f"{words.get(i, f'[unused{i}]')}\n" for i in range(128)))
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer", "do_lower_case": true}')
    with Engine(str(directory), max_num_seqs=2) as old:
        np.testing.assert_array_equal(old.embed("A text"), engine.embed([CLS, 5, 6, SEP]))


def test_normalization_changes_the_length_alone(engine: Engine):
    for pooling in ("mean", "cls"):
        plain = engine.embed(["a text", "a"], pooling=pooling, normalize=False)
        lengths = np.linalg.norm(plain, axis=1, keepdims=True)
        assert np.abs(lengths - 1).min() > 0.1
        np.testing.assert_allclose(plain / lengths, engine.embed(["a text", "a"], pooling=pooling), rtol=1e-6)


def test_poolings_differ(engine: Engine):
    assert np.abs(engine.embed("a text", pooling="mean") - engine.embed("a text", pooling="cls")).max() > 0.01
    with pytest.raises(ValueError, match="pooling='max': unknown; known: mean, cls"):
        engine.embed("a text", pooling="max")


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "the prompt is empty"),
        ([], "the prompt is empty"),
        ([5, 128], r"128 is not a token id of the model; ids are integers in \[0, 128\)"),
        ([-1], "-1 is not a token id"),
        ([5] * 33, "prompt of 33 tokens is longer than --max_model_len=32; shorten it"),
        ("a " * 31, "prompt of 33 tokens is longer than --max_model_len=32"),  # with [CLS] and [SEP]
        (None, "None is neither a text nor token ids"),
    ],
)
def test_a_prompt_that_cannot_run_is_refused_before_any_does(engine: Engine, prompt: Any, message: str):
    before = engine.metrics().num_steps
    with pytest.raises(ValueError, match=f"^(prompt: )?{message}"):
        engine.embed([prompt])
    with pytest.raises(ValueError, match=f"^prompt 1: (prompt: )?{message}"):
        engine.embed(["a text", prompt])
    assert engine.metrics().num_steps == before


def test_the_longest_prompt_runs(engine: Engine):
    assert np.isfinite(engine.embed([5] * 32)).all()


def test_metrics_count_prompts_tokens_and_steps(model_dir: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    with Engine(str(model_dir), max_num_seqs=2, show_progress=True) as engine:
        engine.embed([[5] * 3, [6] * 20, [7] * 4, [8] * 5])
        metrics = engine.metrics()
    assert (metrics.prompt_tokens, metrics.num_steps, metrics.finished["stop"]) == (32, 3, 4)
    assert metrics.num_compilations_after_ready == 0 and metrics.generation_tokens == 0
    assert 'jaxinfer_requests_finished_total{reason="stop"} 4' in metrics.prometheus_text()
    said = capsys.readouterr().err
    assert "memory per device: 270.2 KiB weights + " in said and " workspace of " in said and "cache" not in said
    assert "compiling: 4 programs in " in said and "embedding: 4 prompts in " in said


GENERATES: dict[str, Callable[[Engine], object]] = {
    "generate": lambda engine: engine.generate("a text"),
    "generate with params": lambda engine: engine.generate("a text", SamplingParams()),
    "stream": lambda engine: engine.stream("a text", SamplingParams()),
    "chat": lambda engine: engine.chat([{"role": "user", "content": "a text"}]),
    "beam_search": lambda engine: engine.beam_search("a text", beam_width=2),
    "add_request": lambda engine: engine.add_request("a text", SamplingParams()),
    "step": lambda engine: engine.step(),
    "default_sampling_params": lambda engine: engine.default_sampling_params,
    "AsyncEngine.from_engine": AsyncEngine.from_engine,
}


@pytest.mark.parametrize("name", GENERATES)
def test_an_encoder_generates_nothing(engine: Engine, name: str):
    with pytest.raises(ValueError, match=f"^{REFUSAL}$"):
        GENERATES[name](engine)
    assert not engine.has_unfinished_requests


def test_an_encoder_is_refused_before_it_is_loaded(
    model_dir: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """By those who can only generate: the command line, in a line and with exit code 1, and AsyncEngine."""
    monkeypatch.setattr(Engine, "__init__", lambda *_, **__: pytest.fail("an engine was made"))
    assert run_here(f"--model={model_dir}", "--prompt=a text", "--allow_cpu") == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"run_inference: error: {REFUSAL}"
    with pytest.raises(ValueError, match=f"^{REFUSAL}$"):
        AsyncEngine(str(model_dir))


def test_a_decoder_has_no_embeddings(tmp_path: pathlib.Path):
    with Engine(str(tiny_model.make(tmp_path / "model")), **tiny_model.ONE_SLOT) as engine:
        with pytest.raises(
            ValueError,
            match=r"^LlamaForCausalLM is a decoder: it generates and has no embeddings; use Engine\.generate$",
        ):
            engine.embed(["a text"])
        resolve.check_generates(str(engine.resolved.model_dir))


def test_a_closed_engine_embeds_nothing(model_dir: pathlib.Path):
    engine = Engine(str(model_dir), max_num_seqs=1, max_model_len=16)
    engine.close()
    engine.close()
    with pytest.raises(RuntimeError, match="the engine is closed"):
        engine.embed("a text")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_model_len": 33}, "--max_model_len=33 is beyond the 32 positions"),
        ({"kv_cache_dtype": "int8"}, "--kv_cache_dtype=int8: BertModel is an encoder and has no cache; leave it out"),
        ({"kv_cache_bytes": 10**6}, "--kv_cache_bytes=1000000: BertModel is an encoder and has no cache; leave it out"),
        ({"page_size": 16}, "--page_size=16: BertModel is an encoder and has no cache"),
        (
            {"attention_backend": "xla"},
            "--attention_backend=xla: BertModel is an encoder, and has one; leave it out",
        ),
        ({"mesh": "data:2", "max_num_seqs": 3}, "--max_num_seqs=3 does not divide over data:2; use 4"),
        (
            {"memory_fraction": 1e-7},
            r"270.2 KiB of weights and .* of workspace are more than the .* B that --memory_fr",
        ),
    ],
)
def test_settings_that_cannot_work(model_dir: pathlib.Path, settings: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Engine(str(model_dir), **settings)


def test_values_that_are_not_finite_are_reported_with_the_place_of_the_prompt(tmp_path: pathlib.Path):
    tensors = recipe.weights("bert", CONFIG)
    tensors["embeddings.word_embeddings.weight"][9] = np.nan
    recipe.write_model(tmp_path / "model", CONFIG, tensors)
    with (
        Engine(str(tmp_path / "model"), max_num_seqs=4) as engine,
        pytest.raises(RuntimeError, match=r"values that are not finite; prompts 0, 2$"),
    ):
        engine.embed([[5, 9], [5, 6], [9], [7]])


def test_the_converter_says_what_it_leaves_out_and_compares_vectors(model_dir: pathlib.Path, tmp_path: pathlib.Path):
    source = make(tmp_path / "source")
    tensors = recipe.weights("bert", CONFIG) | {"pooler.dense.bias": np.ones(64, np.float32)}
    save_file(tensors, source / "model.safetensors")
    command = [
        sys.executable,
        "-m",
        "jaxinfer.convert_checkpoint",
        f"--source={source}",
        f"--target={tmp_path / 'new'}",
    ]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment(), check=False)
    assert done.returncode == 0, done.stderr
    assert "left out, for inference does not need them: pooler.dense.bias\n" in done.stderr
    assert "checked: both directories give the same vectors of 2 prompts" in done.stderr
    with Engine(str(tmp_path / "new"), max_num_seqs=1) as new, Engine(str(source), max_num_seqs=1) as old:
        np.testing.assert_array_equal(new.embed([5, 6]), old.embed([5, 6]))


def test_bfloat16(model_dir: pathlib.Path, engine: Engine):
    with Engine(str(model_dir), max_num_seqs=1, max_model_len=16, dtype="bfloat16") as rounded:
        vectors = rounded.embed("a text")
    assert vectors.dtype == np.float32
    assert 1e-4 < np.abs(vectors - engine.embed("a text")).max() < 0.05


def test_several_processes_are_refused_before_anything_is_loaded(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
):
    group = types.SimpleNamespace(leads=True, all_gather=lambda topic, value: [value, value])
    monkeypatch.setattr("jaxinfer.engine.process_group", lambda: group)
    monkeypatch.setattr("jaxinfer.engine.load_weights", lambda *_: pytest.fail("it was loaded"))
    with pytest.raises(ValueError, match=r"^BertModel is an encoder, which runs in one process; start only one$"):
        Engine(str(make(tmp_path / "model")))
