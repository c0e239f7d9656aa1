"""Bitmaps as the image has them (qcow2 specification, "Bitmaps extension" and "Bitmaps"): their directory and tables.

Bytes in, values out, and the reverse. Whatever the image says is checked here before anybody uses it; extra data are
kept. Knows nothing about what bitmaps mean.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator

from vhostblk.block.drivers.qcow2.entries import OFFSET_MASK
from vhostblk.block.drivers.qcow2.extensions import Extension, ExtensionType
from vhostblk.block.drivers.qcow2.header import MAX_OFFSET, AutoClear, Header
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.tables import Table, read_bytes, read_table
from vhostblk.block.edge import Edge
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import ImageError

_EXTENSION = struct.Struct(">IIQQ")
# Table: offset, entries; flags; type, granularity (its logarithm); lengths of name and extra data.
_ENTRY = struct.Struct(">QIIBBHI")
_DIRTY_TRACKING = 1
# The specification's limits, or those of everybody who reads such images.
MAX_BITMAPS = 65535
MAX_NAME = 1023
MIN_GRANULARITY_BITS = 9
MAX_GRANULARITY_BITS = 31
MAX_BYTES = 512 << 20
"""Of one bitmap, in whole clusters."""
_MAX_TABLE_ENTRIES = 1 << 27
MAX_DIRECTORY = 64 << 20

ALL_ONES = 1
"""An entry of a bitmap table without a place: all its bits are 1."""
_TABLE_RESERVED = 0xFF00_0000_0000_01FE


class BitmapFlag(enum.IntFlag):
    """What the directory says about a bitmap."""

    IN_USE = 1  # what is in the image is out of date
    AUTO = 2  # enabled
    EXTRA_DATA_COMPATIBLE = 4  # who does not know the extra data may use the bitmap


_RESERVED_FLAGS = ~sum(BitmapFlag)
_NO_FLAGS = BitmapFlag(0)


@lean_dataclass(frozen=True, slots=True)
class BitmapEntry:
    """One entry of the directory.

    Attributes:
        table_offset, table_entries: its table, whose entries say where clusters of bits are.
        granularity: bytes of the disk for each bit.
        extra: data that nobody here knows.
    """

    name: str
    granularity: int
    table_offset: int
    table_entries: int
    flags: BitmapFlag = _NO_FLAGS
    extra: bytes = b""

    @property
    def table_bytes(self) -> int:
        """What the table takes."""
        return self.table_entries * 8

    def to_bytes(self) -> bytes:
        """The entry, with its padding."""
        name = self.name.encode(errors="surrogateescape")
        entry = _ENTRY.pack(
            *(self.table_offset, self.table_entries, self.flags, _DIRTY_TRACKING),
            *(self.granularity.bit_length() - 1, len(name), len(self.extra)),
        )
        entry += self.extra + name
        return entry + bytes(-len(entry) % 8)


@lean_dataclass(frozen=True, slots=True)
class BitmapDirectory:
    """All bitmaps of an image.

    Attributes: offset, length: of the directory in the file; 0: there is none.
    """

    offset: int = 0
    length: int = 0
    bitmaps: tuple[BitmapEntry, ...] = ()

    def to_bytes(self) -> bytes:
        """All entries."""
        return b"".join(bitmap.to_bytes() for bitmap in self.bitmaps)

    def extension(self) -> Extension:
        """The header extension that says where it is."""
        fields = _EXTENSION.pack(len(self.bitmaps), 0, self.length, self.offset)
        return Extension(ExtensionType.BITMAPS, fields)

    def places(self) -> list[tuple[int, int]]:
        """Offset and length of the directory, and of each bitmap's table; where bits are say the tables."""
        if not self.length:
            return []
        tables = [(one.table_offset, one.table_bytes) for one in self.bitmaps]
        return [(self.offset, self.length), *tables]


def bytes_needed(length: int, granularity: int) -> int:
    """That the bits for a disk of this length take."""
    bits = -(-length // granularity)
    return -(-bits // 8)


async def load_directory(file: Edge, header: Header) -> BitmapDirectory:
    """Read and check the directory; an empty one if there is none, or what there is must not be believed.

    Raises:
        BlockError: the child's errno.
        ImageError: it makes no sense.
    """
    if not header.autoclear & AutoClear.BITMAPS:
        return BitmapDirectory()
    for extension in header.extensions:
        if extension.type == ExtensionType.BITMAPS:
            break
    else:
        return BitmapDirectory()
    if len(extension.data) != _EXTENSION.size:
        raise ImageError("bitmaps_ext: Invalid extension length")
    count, reserved, length, offset = _EXTENSION.unpack(extension.data)
    if reserved:
        raise ImageError("bitmaps_ext: Reserved field is not zero")
    if not 0 < count <= MAX_BITMAPS:
        raise ImageError(f"bitmaps_ext: impossible number of bitmaps: {count}")
    if not 0 < length <= MAX_DIRECTORY:
        raise ImageError(f"bitmaps_ext: impossible size of the bitmap directory: {length}")
    if not offset or offset % header.cluster_size or offset > MAX_OFFSET - length:
        raise ImageError("bitmaps_ext: invalid bitmap directory offset")
    data = bytes(await read_bytes(file, offset, length))
    bitmaps = tuple(_parse(data, header))
    if len(bitmaps) != count:
        raise ImageError(f"Bitmap directory has {len(bitmaps)} bitmaps, not {count}")
    names = {bitmap.name for bitmap in bitmaps}
    if len(names) < count:
        raise ImageError("Two bitmaps have the same name")
    return BitmapDirectory(offset, length, bitmaps)


def _parse(data: bytes, header: Header) -> Iterator[BitmapEntry]:
    at = 0
    while at < len(data):
        if len(data) - at < _ENTRY.size:
            raise ImageError("Bitmap directory ends within an entry")
        (offset, entries, flags, type_, bits, name_length, extra_length) = _ENTRY.unpack_from(
            data, at
        )
        start = at + _ENTRY.size
        end = start + extra_length + name_length
        if end > len(data):
            raise ImageError("Bitmap directory ends within an entry")
        extra, name = data[start : start + extra_length], data[start + extra_length : end]
        at = end + -end % 8
        text = name.decode(errors="surrogateescape")
        why = _problem(header, offset, entries, flags, type_, bits, name)
        if why:
            raise ImageError(f"Bitmap '{text}' doesn't satisfy the constraints: {why}")
        yield BitmapEntry(text, 1 << bits, offset, entries, BitmapFlag(flags), extra)
    if at != len(data):
        raise ImageError("Bitmap directory ends within an entry")


def _problem(
    header: Header, offset: int, entries: int, flags: int, type_: int, bits: int, name: bytes
) -> str:
    """What is wrong with an entry; nothing: all is well."""
    if type_ != _DIRTY_TRACKING:
        return f"unknown type {type_}"
    if flags & _RESERVED_FLAGS:
        return f"reserved flags {flags:#x}"
    if not 0 < len(name) <= MAX_NAME:
        return f"a name of {len(name)} bytes"
    if not MIN_GRANULARITY_BITS <= bits <= MAX_GRANULARITY_BITS:
        return f"granularity 2^{bits}"
    if not offset or offset % header.cluster_size or offset > MAX_OFFSET - entries * 8:
        return f"table offset {offset:#x}"
    size = entries * header.cluster_size
    if not 0 < entries <= _MAX_TABLE_ENTRIES or size > MAX_BYTES:
        return f"a table of {entries} entries"
    # One that was not stored may be of a disk that was resized since.
    if not flags & BitmapFlag.IN_USE and bytes_needed(header.size, 1 << bits) > size:
        return "the table is too small for the disk"
    return ""


async def load_table(file: Edge, header: Header, bitmap: BitmapEntry) -> Table:
    """Read and check the table of one bitmap: for each cluster of bits its place, 0 (all zeroes), or `ALL_ONES`.

    Raises:
        BlockError: the child's errno.
        ImageError: an entry is wrong.
    """
    table = await read_table(file, bitmap.table_offset, bitmap.table_entries)
    for entry in set(table):
        if why := entry_problem(entry, header.cluster_size):
            raise ImageError(f"Bitmap '{bitmap.name}': {why}")
    return table


def entry_problem(entry: int, cluster_size: int) -> str:
    """What is wrong with an entry of a bitmap's table; nothing: all is well."""
    place = entry & OFFSET_MASK
    if entry & _TABLE_RESERVED or place % cluster_size or (place and entry & ALL_ONES):
        return f"entry {entry:#x} of its table is wrong"
    return ""


async def add_bitmap_places(file: Edge, header: Header, places: TablePlaces) -> None:
    """Where directory, tables and bits are, which nobody may overwrite.

    Raises:
        BlockError: the child's errno.
        ImageError: they make no sense, or overlap others.
    """
    directory = await load_directory(file, header)
    for offset, length in directory.places():
        places.add_alone("Bitmap directory or table", offset, length)
    used: set[int] = set()
    for entry in directory.bitmaps:
        for offset in used_by(await load_table(file, header, entry)):
            if offset in used:
                raise ImageError(f"Bitmap '{entry.name}': bits at {offset:#x} are another's, too")
            places.check(f"Bits of bitmap '{entry.name}'", offset)
            used.add(offset)
    places.add_all(used)


def used_by(table: Table) -> list[int]:
    """Where the bits are."""
    return [place for entry in table if (place := entry & OFFSET_MASK)]
