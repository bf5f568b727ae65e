"""Tokenizers: round trips, ids, and files that are broken or not to be trusted."""

import pathlib
import subprocess
import sys

import pytest
import tokenizers
from tokenizers import models

from jaxinfer.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizer.directory import END, TEXTS, byte_level, save


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer: Tokenizer, text: str):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_tokens_show_only_on_request(tokenizer: Tokenizer):
    ids = [*tokenizer.encode("a"), tokenizer.eos_token_id or 0]
    assert END not in tokenizer.decode(ids)
    assert tokenizer.decode(ids, skip_special_tokens=False).endswith(END)
    assert tokenizer.stream(skip_special_tokens=False).add(ids).endswith(END)


def test_text_is_not_cleaned_up(tmp_path: pathlib.Path):
    """transformers' clean-up turns "a ." into "a.", which would take back a space already streamed."""
    loaded = load_tokenizer(save(byte_level(), tmp_path, clean_up_tokenization_spaces=True))
    assert loaded is not None and loaded.decode(loaded.encode("a girl . don 't")) == "a girl . don 't"


def test_vocab_size_covers_added_tokens_with_gaps(tmp_path: pathlib.Path):
    tokenizer = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a"))
    tokenizer.add_special_tokens([END])
    loaded = load_tokenizer(save(tokenizer, tmp_path))
    ids = tokenizer.get_vocab().values()
    assert loaded is not None and loaded.vocab_size == max(ids) + 1 > len(ids)


def test_eos_token(tokenizer: Tokenizer, tmp_path: pathlib.Path):
    assert tokenizer.eos_token_id is not None and tokenizer.decode([tokenizer.eos_token_id], False) == END
    without = load_tokenizer(save(byte_level(), tmp_path, eos_token=None))
    assert without is not None and without.eos_token_id is None


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character 1"):
        tokenizer.encode("a\ud83d")


def test_no_files_no_tokenizer(tmp_path: pathlib.Path):
    (tmp_path / "config.json").write_text("{}")
    assert load_tokenizer(tmp_path) is None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', "\0"])
def test_a_broken_file_is_one_line(tmp_path: pathlib.Path, text: str):
    save(byte_level(), tmp_path)
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ValueError, match="tokenizer files cannot be read") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_code_in_the_directory_is_not_run(tmp_path: pathlib.Path):
    save(byte_level(), tmp_path, auto_map={"AutoTokenizer": [None, "evil.Evil"]}, tokenizer_class="Evil")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    loaded = load_tokenizer(tmp_path)
    assert loaded is not None and loaded.decode(loaded.encode("hi")) == "hi"
    assert not (tmp_path / "ran").exists()


def test_importing_is_cheap_and_loading_imports_no_torch(tmp_path: pathlib.Path):
    save(byte_level(), tmp_path)
    program = (
        "import sys, pathlib, jaxinfer.tokenizer as t; assert 'transformers' not in sys.modules;"
        f"t.load_tokenizer(pathlib.Path({str(tmp_path)!r})); assert not {{'torch', 'jax'}} & sys.modules.keys()"
    )
    root = pathlib.Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
