"""Refuses misspelt keyword arguments with the closest known name."""

import dataclasses
import difflib
from collections.abc import Iterable
from typing import Any


def refuse_unknown(owner: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raises TypeError for the first name in `given` that is not in `known`."""
    known = sorted(known)
    for name in given:
        if name not in known:
            raise TypeError(f"{owner} has no field {name!r}; {suggestion(name, known)}")


def suggestion(name: str, known: Iterable[str]) -> str:
    """For the end of an error: the closest name, and all of them."""
    known = [*known]
    closest = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
    hint = f"did you mean {closest[0]!r}? " if closest else ""
    return f"{hint}known: {', '.join(known)}"


class StrictFields:
    """A base for frozen dataclasses whose constructors refuse unknown names with a suggestion."""

    def __new__(cls, *args: Any, **kwargs: Any):
        del args
        refuse_unknown(cls.__name__, kwargs, [field.name for field in dataclasses.fields(cls)])  # pyright: ignore
        return super().__new__(cls)
