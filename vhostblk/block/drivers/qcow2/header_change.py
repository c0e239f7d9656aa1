"""Changing what a header's later sectors have, so that a crash leaves the old header or the new one.

Theory of operation: a disk writes a sector as a whole or not at all, and nothing larger. The extensions and the name of
the backing file may be in several. So they are written anew where the header's cluster is free, and then the first
sector says where: an extension that nobody knows fills the room between. The next change goes back to the front, where
there is room again.

Bytes in, bytes out. Knows nothing about files.
"""

from __future__ import annotations

from dataclasses import replace

from vhostblk.block.drivers.qcow2.extensions import Extension
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.limits import SECTOR_SIZE, align_up

ROOM = 0x526F6F6D
"""An extension for the room that is left."""
_EXTENSION_HEADER = 8

Write = tuple[int, bytes]


def without_room(header: Header) -> Header:
    """What it says, wherever that is."""
    kept = tuple(extension for extension in header.extensions if extension.type != ROOM)
    return replace(header, extensions=kept)


def change(old: Header, new: Header) -> tuple[Header, list[Write]]:
    """From one header to another.

    Returns: the new header as it is going to be read, and what has to be written, with a flush after each.

    Raises:
        ImageError: it does not fit into a cluster.
    """
    new = replace(without_room(new), backing_offset=0)
    before = old.to_bytes()
    front = new.to_bytes()
    start = len(replace(new, extensions=(), backing_name="").to_bytes()) - _EXTENSION_HEADER
    if _is_one_sector(before, front):
        return new, [(0, front)]
    used = _used_from(old, start)
    if len(front) <= used:
        return new, _writes(front)
    place = max(SECTOR_SIZE, align_up(len(before), 8))
    room = before.ljust(place, b"\0")[start + _EXTENSION_HEADER : place]
    moved = replace(new, extensions=(Extension(ROOM, room), *new.extensions))
    if place + len(front) - start <= new.cluster_size:
        behind = moved.to_bytes()
        free = max(SECTOR_SIZE, len(before))
        return moved, [(free, behind[free:]), (0, behind[:SECTOR_SIZE])]
    return new, [(0, front)]  # no room: as everybody else does


def _used_from(header: Header, start: int) -> int:
    """Where the first byte behind the first sector is that somebody needs."""
    first = header.extensions[:1]
    if first and first[0].type == ROOM:
        return start + _EXTENSION_HEADER + len(first[0].data)
    return SECTOR_SIZE


def _writes(data: bytes) -> list[Write]:
    first: list[Write] = [(0, data[:SECTOR_SIZE])]
    return [(SECTOR_SIZE, data[SECTOR_SIZE:]), *first] if data[SECTOR_SIZE:] else first


def _is_one_sector(one: bytes, other: bytes) -> bool:
    length = max(len(one), len(other))
    one, other = one.ljust(length, b"\0"), other.ljust(length, b"\0")
    different = [
        at
        for at in range(0, length, SECTOR_SIZE)
        if one[at : at + SECTOR_SIZE] != other[at : at + SECTOR_SIZE]
    ]
    return len(different) <= 1
