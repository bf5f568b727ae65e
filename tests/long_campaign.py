"""What the plain tests leave out, because it takes long and says little more: `JAXINFER_TEST_ALL=1 pytest` has it."""

import os
from collections.abc import Sequence
from typing import TypeVar

import pytest

T = TypeVar("T")
IS_LONG = os.environ.get("JAXINFER_TEST_ALL") == "1"
only_long = pytest.mark.skipif(not IS_LONG, reason="of the long campaign: JAXINFER_TEST_ALL=1")


def chosen(everything: Sequence[T], *telling: T) -> tuple[T, ...]:
    """`telling`, which are of `everything`; in the long campaign that."""
    assert all(one in everything for one in telling)
    return tuple(everything) if IS_LONG else telling
