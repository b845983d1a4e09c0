"""Protobuf messages written by hand, field by field, in all the ways that the encoding allows."""

from __future__ import annotations

VARINT, FIXED64, LEN, START_GROUP, END_GROUP, FIXED32 = range(6)


def varint(number: int, *, width: int = 0) -> bytes:
    """A number in base 128, in more bytes than it needs if `width` says so."""
    parts = [number & 0x7F]
    while number := number >> 7:
        parts.append(number & 0x7F)
    parts += [0] * (width - len(parts))
    return bytes([*(part | 0x80 for part in parts[:-1]), parts[-1]])


def field(number: int, content: bytes | int, *, width: int = 0) -> bytes:
    """A field with bytes or a message in it, or with a number."""
    if isinstance(content, int):
        return varint(number << 3 | VARINT) + varint(content)
    return varint(number << 3 | LEN) + varint(len(content), width=width) + content


def tensor(*parts: bytes, dims: tuple[int, ...], data_type: int = 1, name: bytes = b"w") -> bytes:
    """A TensorProto: its dimensions, type and name, and then `parts`."""
    return b"".join([*(field(1, dim) for dim in dims), field(2, data_type), field(8, name), *parts])
