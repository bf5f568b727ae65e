"""Messages between the processes of an engine: JSON and raw arrays, so that reading one runs nothing.

    "JXF1" | kind, 1 byte | bytes of the header, 4 | bytes of the arrays, 8 | header | arrays

Integers are little-endian. The header is the JSON of {"value": ..., "arrays": [[dtype, shape], ...]}; the arrays'
bytes follow each other in that order. What is read is checked before memory is taken for it.
"""

import enum
import json
import math
import socket
import struct
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

MAX_HEADER_BYTES = 1 << 20
MAX_ARRAY_BYTES = 1 << 28  # a step's bias and history for several large vocabularies

_MAGIC = b"JXF1"
_PREFIX = struct.Struct("<4sBIQ")
_DTYPES = ("bool", "int32", "uint32", "float32")  # of what steps are given


class Kind(enum.IntEnum):
    """What a frame is for. HELLO comes first; FATAL is the last of a job that fails."""

    HELLO = 1
    HEARTBEAT = 2
    FATAL = 3
    GATHER = 4
    STEP = 5
    RESET_CACHE = 6
    CLOSE = 7


class Frame(NamedTuple):
    """A message as it was read; `arrays` are read-only."""

    kind: Kind
    value: Any
    arrays: list[np.ndarray]


def encode(kind: Kind, value: Any = None, arrays: Sequence[np.ndarray] = ()) -> bytes:
    """The bytes of a frame. Raises ValueError for what `read` would refuse."""
    described = [[array.dtype.name, array.shape] for array in arrays]
    if unknown := {dtype for dtype, _ in described} - {*_DTYPES}:
        raise ValueError(f"a frame has arrays of {' '.join(_DTYPES)}, and none of {' '.join(sorted(unknown))}")
    header = json.dumps({"value": value, "arrays": described}).encode()
    data = b"".join(array.tobytes() for array in arrays)
    _check_sizes(len(header), len(data), MAX_HEADER_BYTES, MAX_ARRAY_BYTES)
    return _PREFIX.pack(_MAGIC, kind, len(header), len(data)) + header + data


def read(
    read_exactly: Callable[[int], bytes],
    *,
    max_header_bytes: int = MAX_HEADER_BYTES,
    max_array_bytes: int = MAX_ARRAY_BYTES,
) -> Frame:
    """The next frame from `read_exactly(num_bytes)`. Raises ValueError, which says why, for anything else."""
    magic, kind, header_bytes, array_bytes = _PREFIX.unpack(read_exactly(_PREFIX.size))
    if magic != _MAGIC or kind not in set(Kind):
        raise ValueError(f"no frame of this protocol: it starts with {magic!r} and kind {kind}")
    _check_sizes(header_bytes, array_bytes, max_header_bytes, max_array_bytes)
    value, described = _parse_header(read_exactly(header_bytes))
    sizes = [math.prod(shape) * dtype.itemsize for dtype, shape in described]
    if sum(sizes) != array_bytes:
        raise ValueError(f"a frame of {array_bytes} bytes of arrays describes arrays of {sum(sizes)}")
    data, start, arrays = read_exactly(array_bytes), 0, []
    for (dtype, shape), size in zip(described, sizes, strict=True):
        arrays.append(np.frombuffer(data, dtype, count=math.prod(shape), offset=start).reshape(shape))
        start += size
    return Frame(Kind(kind), value, arrays)


def reader(connection: socket.socket) -> Callable[[int], bytes]:
    """What reads so many bytes from a connection, for `read`; ConnectionError at its end."""

    def read_exactly(num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        view, done = memoryview(data), 0
        while done < num_bytes:
            got = connection.recv_into(view[done:])
            if got == 0:
                raise ConnectionError("its connection was closed" + (" within a frame" if done else ""))
            done += got
        return bytes(data)

    return read_exactly


def _parse_header(header: bytes) -> tuple[Any, list[tuple[np.dtype, tuple[int, ...]]]]:
    try:
        fields = json.loads(header)
        described = [(str(dtype), tuple(shape)) for dtype, shape in fields["arrays"]]
        value = fields["value"]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"a frame's header cannot be read: {error!r}") from None
    for dtype, shape in described:
        if dtype not in _DTYPES or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError(f"a frame describes an array {dtype[:20]}{[*shape][:10]}, which no step has")
    return value, [(np.dtype(dtype), shape) for dtype, shape in described]


def _check_sizes(header_bytes: int, array_bytes: int, max_header_bytes: int, max_array_bytes: int) -> None:
    if header_bytes > max_header_bytes:
        raise ValueError(f"a frame's header of {header_bytes} bytes is larger than {max_header_bytes}")
    if array_bytes > max_array_bytes:
        raise ValueError(f"a frame's {array_bytes} bytes of arrays are more than {max_array_bytes}")
