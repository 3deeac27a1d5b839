"""Protocol buffers at the level of bytes: a message is a row of (field number and wire type, value).

A field of wire type 2 is a length and so many bytes. Enough to read or copy parts of a file that is larger than memory,
or on a machine without the package onnx.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

__all__ = ["field_bytes", "fields", "varint"]

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def fields(content: bytes | mmap.mmap, begin: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """Yield (number, start of the field, start and end of its value); a varint's value is empty.

    Raises:
        IndexError: the bytes end within a field, or are no message.
    """
    at = begin
    while at < end:
        start = at
        key, at = varint(content, at)
        kind = key & 7
        value = at
        if not key >> 3:  # no field has the number 0; a file of zeros would be read to its end
            raise IndexError(start)
        if kind == _VARINT:
            _, at = varint(content, at)
            value = at
        elif kind == _BYTES:
            length, value = varint(content, at)
            at = value + length
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise IndexError(start)
        if at > end:
            raise IndexError(start)
        yield key >> 3, start, value, at


def varint(content: bytes | mmap.mmap, at: int) -> tuple[int, int]:
    """Return the number that starts here, and where it ends.

    Raises:
        IndexError: the bytes end within it, or it has more than ten bytes.
    """
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if not byte & 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise IndexError(at)


def field_bytes(number: int, content: bytes) -> bytes:
    """Return a field of wire type 2 with its key and length in front."""
    return _encode(number << 3 | _BYTES) + _encode(len(content)) + content


def _encode(value: int) -> bytes:
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
