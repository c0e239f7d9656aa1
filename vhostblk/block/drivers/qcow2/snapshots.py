"""Internal snapshots as the image has them (qcow2 specification, "Snapshots"): bytes in, values out, and the reverse.

Whatever the table says is checked here before anybody uses it. Extra data that nobody here knows are kept, so that
`Snapshot.to_bytes` gives back what was read. Knows nothing about what snapshots show.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from vhostblk.block.drivers.qcow2.entries import OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import MAX_OFFSET, Header
from vhostblk.block.drivers.qcow2.tables import read_bytes, read_table
from vhostblk.block.edge import Edge
from vhostblk.errors import ImageError

# L1 table: offset, entries; lengths of ID and name; date, clock, size of the guest's state; length of what follows.
_ENTRY = struct.Struct(">QIHHIIQII")
# The specification has no limit; these are those of everybody who reads such images.
MAX_TABLE = 64 << 20
_MAX_L1_BYTES = 32 << 20
_MAX_EXTRA = 1024
_MAX_STRING = (1 << 16) - 1
_PIECE = 64 << 10
NO_ICOUNT = (1 << 64) - 1
"""What `Snapshot.icount` is when nobody has counted instructions."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """One entry of the snapshot table. Offsets and sizes are bytes.

    Attributes:
        l1_offset, l1_entries: its L1 table.
        id, name: the first is unique.
        seconds, nanoseconds: when it was taken, since 1970.
        vm_clock: how long the guest had been running, in nanoseconds.
        vm_state_size: of the guest's saved state, which is behind the end of the disk; 0: there is none.
        disk_size: of the disk at that time; None: the entry does not say, as in version 2.
        icount: instructions that the guest had executed; None: the entry does not say.
        unknown: extra data behind these.
    """

    l1_offset: int
    l1_entries: int
    id: str
    name: str
    seconds: int = 0
    nanoseconds: int = 0
    vm_clock: int = 0
    vm_state_size: int = 0
    disk_size: int | None = None
    icount: int | None = None
    unknown: bytes = b""

    @property
    def l1_bytes(self) -> int:
        """What the L1 table takes."""
        return self.l1_entries * 8

    def to_bytes(self) -> bytes:
        """The entry, with its padding. It always says what version 3 wants to know, where that is known.

        Raises:
            ImageError: the ID or the name is too long.
        """
        id_, name = _encode("ID", self.id), _encode("name", self.name)
        extra = b""
        if self.disk_size is not None:
            extra = struct.pack(">QQ", self.vm_state_size, self.disk_size)
            if self.icount is not None:
                extra += self.icount.to_bytes(8) + self.unknown
        elif self.vm_state_size >> 32:
            extra = self.vm_state_size.to_bytes(8)
        # Who knows 32 bits only must not take a part of the state for all of it.
        short = 0 if self.vm_state_size >> 32 else self.vm_state_size
        entry = _ENTRY.pack(
            *(self.l1_offset, self.l1_entries, len(id_), len(name)),
            *(self.seconds, self.nanoseconds, self.vm_clock, short, len(extra)),
        )
        entry += extra + id_ + name
        return entry + bytes(-len(entry) % 8)


@dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All snapshots of an image.

    Attributes: offset, length: of the table in the file; 0: there is none.
    """

    offset: int = 0
    length: int = 0
    snapshots: tuple[Snapshot, ...] = ()

    def places(self) -> list[tuple[int, int]]:
        """Offset and length of the table itself, and of each snapshot's L1 table, where there are any."""
        found = [(one.l1_offset, one.l1_bytes) for one in self.snapshots if one.l1_entries]
        return [*found, (self.offset, self.length)] if self.length else found

    def find(self, id_: str | None, name: str | None) -> Snapshot | None:
        """The first one with this ID and this name, where they are given."""
        for one in self.snapshots:
            if id_ in (None, one.id) and name in (None, one.name):
                return one
        return None

    def find_either(self, id_or_name: str) -> Snapshot | None:
        """The one with this ID; or, if there is none, the first with this name."""
        return self.find(id_or_name, None) or self.find(None, id_or_name)

    def next_id(self) -> str:
        """One more than the largest number that is an ID."""
        return str(max((_leading_number(one.id) for one in self.snapshots), default=0) + 1)


async def load_snapshots(file: Edge, header: Header) -> SnapshotTable:
    """Read and check the table.

    Raises:
        BlockError: the child's errno.
        ImageError: it makes no sense.
    """
    if not header.snapshots:
        return SnapshotTable()
    reader = _Reader(file, header.snapshots_offset)
    found = []
    for number in range(header.snapshots):
        snapshot = await _load_one(reader, number)
        _check_l1(snapshot, header)
        found.append(snapshot)
    return SnapshotTable(header.snapshots_offset, reader.taken, tuple(found))


async def _load_one(reader: _Reader, number: int) -> Snapshot:
    # Entries begin at multiples of 8; what is behind the last one is nobody's business.
    await reader.take(-reader.taken % 8)
    (l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, vm_clock, vm_state_size,
     extra_length) = _ENTRY.unpack(await reader.take(_ENTRY.size))  # fmt: skip
    if extra_length > _MAX_EXTRA:
        raise ImageError(f"Too much extra metadata in snapshot table entry {number}")
    extra = await reader.take(extra_length)
    if len(extra) >= 8:
        vm_state_size = int.from_bytes(extra[:8])
    return Snapshot(
        l1_offset,
        l1_entries,
        (await reader.take(id_length)).decode(errors="surrogateescape"),
        (await reader.take(name_length)).decode(errors="surrogateescape"),
        seconds,
        nanoseconds,
        vm_clock,
        vm_state_size,
        int.from_bytes(extra[8:16]) if len(extra) >= 16 else None,
        int.from_bytes(extra[16:24]) if len(extra) >= 24 else None,
        extra[24:],
    )


def _check_l1(snapshot: Snapshot, header: Header) -> None:
    if (
        snapshot.l1_offset % header.cluster_size
        or snapshot.l1_offset > MAX_OFFSET
        or snapshot.l1_bytes > _MAX_L1_BYTES
        or (snapshot.l1_entries and not snapshot.l1_offset)
    ):
        raise ImageError(f"L1 table of snapshot '{snapshot.id}' is wrong")


class _Reader:
    """Bytes from a place on, of which nobody knows in advance how many they are."""

    def __init__(self, file: Edge, offset: int) -> None:
        self.taken = 0
        self._file = file
        self._at = offset
        self._read = b""

    async def take(self, length: int) -> bytes:
        """The next ones."""
        self.taken += length
        if self.taken > MAX_TABLE:
            raise ImageError("Snapshot table is too large")
        while len(self._read) < length:
            self._read += await read_bytes(self._file, self._at, _PIECE)
            self._at += _PIECE
        found, self._read = self._read[:length], self._read[length:]
        return found


def _encode(what: str, text: str) -> bytes:
    encoded = text.encode(errors="surrogateescape")
    if len(encoded) > _MAX_STRING:
        raise ImageError(f"The {what} of a snapshot is too long")
    return encoded


def _leading_number(text: str) -> int:
    digits = text[: len(text) - len(text.lstrip("0123456789"))]
    return int(digits) if digits and len(digits) < 20 else 0


async def inactive_tables(file: Edge, header: Header) -> set[int]:
    """Where the L2 tables of snapshots are.

    Raises:
        BlockError: the child's errno.
        ImageError: an entry makes no sense.
    """
    found: set[int] = set()
    for snapshot in (await load_snapshots(file, header)).snapshots:
        l1 = await read_table(file, snapshot.l1_offset, snapshot.l1_entries)
        found.update(entry & OFFSET_MASK for entry in l1)
    return found - {0}
