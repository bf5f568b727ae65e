"""Prompts files: what is a line, what is a record, and that nothing in them is dropped silently."""

import json
import pathlib
import re

import pytest

from jaxinfer.prompts import read_prompts_file


def read(directory: pathlib.Path, name: str, content: str | bytes) -> list[str | list[int]]:
    path = directory / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read_prompts_file(path)


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\u0085", "\f", "\v", "\x1c"])
def test_only_a_newline_ends_a_line(tmp_path: pathlib.Path, separator: str):
    """str.splitlines() splits at each of these, and JSON strings may hold the first three as they are."""
    prompt = f"a{separator}b"
    assert read(tmp_path, "in.txt", f"{prompt}\nc") == [prompt, "c"]
    record = json.dumps({"prompt": prompt}, ensure_ascii=False)
    assert read(tmp_path, "in.jsonl", f"{record}\n") == [prompt]


def test_windows_files_are_read(tmp_path: pathlib.Path):
    assert read(tmp_path, "in.txt", b"\xef\xbb\xbfabc\r\n\r\nd\r\n") == ["abc", "d"]
    assert read(tmp_path, "in.JSONL", b'\xef\xbb\xbf{"prompt": "abc"}\r\n{"prompt_token_ids": [1, 2]}\r\n') == [
        "abc",
        [1, 2],
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a", "max_tokens": 5}', "unknown key 'max_tokens'; known: prompt, prompt_token_ids"),
        ('{"prompt": "a", "prompt_token_ids": [1]}', "both prompt and prompt_token_ids; give one of them"),
        ("{}", "neither prompt nor prompt_token_ids"),
        ('{"prompt": "a", "prompt": "b"}', "not valid JSON: a key stands twice"),
        ('{"prompt": 5}', "prompt must be text"),
        ('{"prompt": null}', "prompt must be text"),
        ('{"prompt_token_ids": [1, true]}', "prompt must be text and prompt_token_ids a list of integers"),
        ('{"prompt_token_ids": "1 2"}', "prompt must be text and prompt_token_ids a list of integers"),
        ('["a"]', "expected an object"),
        ('{"prompt": ', "not valid JSON: Expecting value"),
        ('{"prompt": ' + "[" * 100_000, "not valid JSON: "),
        ('{"prompt_token_ids": [' + "9" * 5000 + "]}", "not valid JSON: "),
    ],
    ids=lambda value: value[:40],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path: pathlib.Path, line: str, message: str):
    with pytest.raises(ValueError, match=r"in\.jsonl:3: " + re.escape(message)):
        read(tmp_path, "in.jsonl", f'{{"prompt": "fine"}}\n\n{line}\n')


def test_a_file_that_cannot_be_read_is_named(tmp_path: pathlib.Path):
    with pytest.raises(ValueError, match=r"--prompts_file=.*in\.json: \.json is not read; give a \.jsonl file"):
        read(tmp_path, "in.json", "[]")
    with pytest.raises(ValueError, match=r"--prompts_file=.*in\.txt: not UTF-8 text"):
        read(tmp_path, "in.txt", b"\xff\xfe")
    with pytest.raises(ValueError, match=r"--prompts_file=.*: Is a directory"):
        read_prompts_file(tmp_path)
