"""Reads prompts from a file. Host only."""

import json
import pathlib
from typing import Any

_KEYS = ("prompt", "prompt_token_ids")


def read_prompts_file(path: pathlib.Path) -> list[str | list[int]]:
    """A prompt per line of a text file, or of the objects in a `.jsonl` file, by `prompt` or `prompt_token_ids`.

    Blank lines are skipped. Raises ValueError naming the file, and the line that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix == ".json":
        raise ValueError(f"--prompts_file={path}: .json is not read; give a .jsonl file with one object per line")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"--prompts_file={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompts_file={path}: not UTF-8 text: {error}") from None
    # Not splitlines(), which also splits at characters that a line may hold, such as U+2028 within a JSON string.
    lines = [line.removesuffix("\r") for line in text.split("\n")]
    if suffix == ".jsonl":
        return [_parse(line, f"{path}:{n}") for n, line in enumerate(lines, start=1) if line.strip()]
    return [line for line in lines if line.strip()]


def _parse(line: str, where: str) -> str | list[int]:
    try:
        record: Any = json.loads(line, object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or an integer of thousands of digits
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object with prompt or prompt_token_ids")
    for key in record:
        if key not in _KEYS:
            raise ValueError(f"{where}: unknown key {key!r}; known: {', '.join(_KEYS)}")
    if len(record) != 1:
        found = "both prompt and" if record else "neither prompt nor"
        raise ValueError(f"{where}: {found} prompt_token_ids; give one of them")
    prompt, token_ids = record.get("prompt"), record.get("prompt_token_ids")
    if isinstance(prompt, str):
        return prompt
    if isinstance(token_ids, list) and all(type(token_id) is int for token_id in token_ids):
        return token_ids
    raise ValueError(f"{where}: prompt must be text and prompt_token_ids a list of integers")


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a key that stands twice json would silently keep the last."""
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return record
