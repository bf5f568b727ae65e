"""Flags from a TOML file, as --config gives it. Host only."""

import difflib
import pathlib
import tomllib
from collections.abc import Collection

from absl import flags


def read_config_file(path: pathlib.Path, flag_values: flags.FlagValues, names: Collection[str]) -> None:
    """Sets the flags `names` from the file's keys, but for those that the command line gave.

    A flag that may be repeated is a list. Raises ValueError, naming the file, for what is not TOML, for a key that
    is not in `names`, and for a value that its flag refuses.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"--config={path}: {error.strerror}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise ValueError(f"--config={path}: {error}") from None
    for name, value in values.items():
        if name not in names:
            closest = difflib.get_close_matches(name, names, n=1, cutoff=0.0)[0]
            raise ValueError(f"--config={path}: unknown key {name!r}; did you mean {closest!r}?")
        flag = flag_values[name]
        if flag.present:
            continue
        try:
            flag.parse(value)
        except flags.IllegalFlagValueError as error:
            raise ValueError(f"--config={path}: {error}") from None
