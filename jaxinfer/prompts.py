"""Reads prompts from a file. Host only."""

import json
import pathlib
from typing import Any


def read_prompts_file(path: pathlib.Path) -> list[str | list[int]]:
    """A prompt per line of a text file, or of the objects in a `.jsonl` file, by `prompt` or `prompt_token_ids`.

    Blank lines are skipped. Raises ValueError naming the line that cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise ValueError(f"--prompts_file={path}: no such file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts_file={path}: not UTF-8 text: {error}") from None
    if path.suffix == ".jsonl":
        return [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    return [line for line in lines if line.strip()]


def _parse(line: str, where: str) -> str | list[int]:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with prompt or prompt_token_ids")
    if isinstance(record.get("prompt"), str):
        return record["prompt"]
    if isinstance(record.get("prompt_token_ids"), list):
        return record["prompt_token_ids"]
    raise ValueError(f"{where}: neither prompt (text) nor prompt_token_ids (list of ids) is there")
