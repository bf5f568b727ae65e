"""What travels between processes comes back as it was, and nothing else is read."""

import json
import struct
from collections.abc import Callable

import numpy as np
import pytest

from jaxinfer import frames
from jaxinfer.frames import Kind

ARRAYS = [
    np.arange(6, dtype=np.int32).reshape(2, 3),
    np.array(True),
    np.zeros((0, 4), np.float32),
    np.array([2**32 - 1], np.uint32),
]


def reader(data: bytes) -> Callable[[int], bytes]:
    place = 0

    def read_exactly(num_bytes: int) -> bytes:
        nonlocal place
        if place + num_bytes > len(data):
            raise ConnectionError("its connection was closed within a frame")
        place += num_bytes
        return data[place - num_bytes : place]

    return read_exactly


def by_hand(header: bytes, data: bytes = b"", magic: bytes = b"JXF1", kind: int = Kind.STEP) -> bytes:
    return struct.pack("<4sBIQ", magic, kind, len(header), len(data)) + header + data


def described(dtype: object, shape: object) -> bytes:
    return json.dumps({"value": None, "arrays": [[dtype, shape]]}).encode()


def test_what_is_encoded_is_read():
    read_exactly = reader(frames.encode(Kind.STEP, {"shape": [1, 2]}, ARRAYS) + frames.encode(Kind.HEARTBEAT))
    frame = frames.read(read_exactly)
    assert (frame.kind, frame.value) == (Kind.STEP, {"shape": [1, 2]})
    for array, original in zip(frame.arrays, ARRAYS, strict=True):
        np.testing.assert_array_equal(array, original, strict=True)
    assert frames.read(read_exactly) == (Kind.HEARTBEAT, None, [])


@pytest.mark.parametrize("missing", [1, 30, 60])
def test_a_truncated_frame_is_refused(missing: int):
    with pytest.raises(ConnectionError, match="within a frame"):
        frames.read(reader(frames.encode(Kind.STEP, "value", ARRAYS)[:-missing]))


@pytest.mark.parametrize(
    ("frame", "problem"),
    [
        (by_hand(b"{}", magic=b"HTTP"), "no frame of this protocol: it starts with b'HTTP'"),
        (by_hand(b"{}", kind=99), "kind 99"),
        (struct.pack("<4sBIQ", b"JXF1", 5, 2**20 + 1, 0), "header of 1048577 bytes is larger than 1048576"),
        (struct.pack("<4sBIQ", b"JXF1", 5, 2, 2**63), "9223372036854775808 bytes of arrays are more than 268435456"),
        (by_hand(b"{"), "header cannot be read"),
        (by_hand(b"[1]"), "header cannot be read"),
        (by_hand(b"\xff"), "header cannot be read"),
        (by_hand(b"[" * 100_000), "header cannot be read"),
        (by_hand(described("object", [1]), b"\0" * 8), r"an array object\[1\], which no step has"),
        (by_hand(described("int32", [-1]), b""), r"int32\[-1\]"),
        (by_hand(described("int32", [1.5]), b""), r"int32\[1.5\]"),
        (by_hand(described("int32", [3]), b"\0" * 8), "8 bytes of arrays describes arrays of 12"),
        (by_hand(described("int32", [1]), b"\0" * 8), "8 bytes of arrays describes arrays of 4"),
    ],
)
def test_what_is_no_frame_is_refused(frame: bytes, problem: str):
    with pytest.raises(ValueError, match=problem):
        frames.read(reader(frame))


def test_limits_are_checked_before_memory_is_taken():
    """Of a stranger's, much smaller ones."""
    frame = frames.encode(Kind.HELLO, "x" * 2000)
    with pytest.raises(ValueError, match="larger than 1024"):
        frames.read(reader(frame), max_header_bytes=1024)
    with pytest.raises(ValueError, match="more than 0"):
        frames.read(reader(frames.encode(Kind.HELLO, None, ARRAYS)), max_array_bytes=0)


@pytest.mark.parametrize("array", [np.array([object()]), np.zeros(1, np.float64), np.array(["a"])])
def test_other_arrays_are_not_sent(array: np.ndarray):
    with pytest.raises(ValueError, match="a frame has arrays of bool int32 uint32 float32, and none of"):
        frames.encode(Kind.STEP, None, [array])


def test_what_is_too_large_is_not_sent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frames, "MAX_ARRAY_BYTES", 8)
    with pytest.raises(ValueError, match="24 bytes of arrays are more than 8"):
        frames.encode(Kind.STEP, None, ARRAYS[:1])
