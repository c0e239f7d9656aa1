"""Internal snapshots as the image has them (qcow2 specification, "Snapshots"): bytes in, values out, and the reverse.

What the table says of itself is checked here before anybody uses it; what it says of a snapshot's L1 table by whoever
uses that (`Snapshot.check_l1`), so that the others are of use if one is damaged. Extra data that nobody here knows are
kept, so that `Snapshot.to_bytes` gives back what was read. Knows nothing about what snapshots show.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

from vhostblk.block.drivers.qcow2.entries import OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import MAX_OFFSET, Header
from vhostblk.block.drivers.qcow2.tables import read_bytes, read_table
from vhostblk.block.edge import Edge
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import BlockError, ImageError

# L1 table: offset, entries; lengths of ID and name; date, clock, size of the guest's state; length of what follows.
_ENTRY = struct.Struct(">QIHHIIQII")
# The specification has no limit; these are those of everybody who reads such images.
MAX_TABLE = 64 << 20
MAX_L1_BYTES = 32 << 20
_MAX_EXTRA = 1024
_MAX_STRING = (1 << 16) - 1
_PIECE = 64 << 10
# Of the file, with all that is too much.
_MOST_READ = (1 << 31) - 1
NO_ICOUNT = (1 << 64) - 1
"""What `Snapshot.icount` is when nobody has counted instructions."""


@lean_dataclass(frozen=True, slots=True)
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

    def check_l1(self, cluster_size: int) -> None:
        """Whether its L1 table can be where it says.

        Raises:
            BlockError: EFBIG, EINVAL: it cannot.
        """
        if self.l1_bytes > MAX_L1_BYTES:
            raise BlockError(errno.EFBIG, "Snapshot L1 table too large")
        if (
            self.l1_offset % cluster_size
            or self.l1_offset > MAX_OFFSET
            or (self.l1_entries and not self.l1_offset)
        ):
            raise BlockError(errno.EINVAL, "Snapshot L1 table offset invalid")

    def l1_problem(self, cluster_size: int) -> str:
        """Why a check does not look at its L1 table, in the words of QEMU; empty: there is no reason."""
        if self.l1_offset % cluster_size:
            what = f"l1_offset={self.l1_offset:#x}: L1 table is not cluster aligned"
        elif self.l1_bytes > MAX_L1_BYTES:
            what = f"l1_size={self.l1_entries:#x}: L1 table is too large"
        else:
            return ""
        return f"{what}; snapshot table entry corrupted"

    def has_l1(self, cluster_size: int) -> bool:
        """Whether there is one, where one can be."""
        try:
            self.check_l1(cluster_size)
        except BlockError:
            return False
        return bool(self.l1_entries)

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


@lean_dataclass(frozen=True, slots=True)
class SnapshotTable:
    """All snapshots of an image.

    Attributes: offset, length: of the table in the file; 0: there is none.
    """

    offset: int = 0
    length: int = 0
    snapshots: tuple[Snapshot, ...] = ()

    def places(self, cluster_size: int) -> list[tuple[int, int]]:
        """Offset and length of the table itself, and of each snapshot's L1 table, where there are any, and can be."""
        found = [
            (one.l1_offset, one.l1_bytes) for one in self.snapshots if one.has_l1(cluster_size)
        ]
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


class SnapshotTableError(ImageError):
    """A table is larger than anybody reads.

    Args:
        hint: how it can be made smaller.
    """

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


@lean_dataclass(slots=True)
class Losses:
    """What a table loses that is made smaller.

    Attributes: say: is told what is lost, in QEMU's words. snapshots: those that are. extra: entries that keep only a
        part of their extra data.
    """

    say: Callable[[str], None]
    snapshots: int = 0
    extra: int = 0


async def load_snapshots(file: Edge, header: Header, losses: Losses | None = None) -> SnapshotTable:
    """Read and check the table.

    Args:
        losses: a table that is too large is not refused, but gets smaller; is told what it loses.

    Raises:
        BlockError: the child's errno.
        SnapshotTableError: it is too large.
    """
    if not header.snapshots:
        return SnapshotTable()
    reader = _Reader(file, header.snapshots_offset)
    found: list[Snapshot] = []
    length = 0  # of what is kept
    for number in range(header.snapshots):
        before = reader.taken
        snapshot, size = await _load_one(reader, number, losses)
        length += -length % 8 + size
        if length > MAX_TABLE or reader.taken > _MOST_READ:
            left = header.snapshots - number
            if losses is None:
                raise SnapshotTableError(
                    "Snapshot table is too big",
                    f"You can force-remove all {left} overhanging snapshots with qemu-img check -r all",
                )
            losses.say(f"Discarding {left} overhanging snapshots (snapshot table is too big)")
            losses.snapshots += left
            return SnapshotTable(header.snapshots_offset, before, tuple(found))
        found.append(snapshot)
    return SnapshotTable(header.snapshots_offset, reader.taken, tuple(found))


async def _load_one(reader: _Reader, number: int, losses: Losses | None) -> tuple[Snapshot, int]:
    """An entry, and its length without what it loses."""
    # Entries begin at multiples of 8; what is behind the last one is nobody's business.
    reader.skip(-reader.taken % 8)
    (l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, vm_clock, vm_state_size,
     extra_length) = _ENTRY.unpack(await reader.take(_ENTRY.size))  # fmt: skip
    kept = min(extra_length, _MAX_EXTRA)
    if extra_length > kept:
        if losses is None:
            raise SnapshotTableError(
                f"Too much extra metadata in snapshot table entry {number}",
                "You can force-remove this extra metadata with qemu-img check -r all",
            )
        losses.say(
            f"Discarding too much extra metadata in snapshot table entry {number}"
            f" ({extra_length} > {_MAX_EXTRA})"
        )
        losses.extra += 1
    extra = await reader.take(kept)
    reader.skip(extra_length - kept)
    if len(extra) >= 8:
        vm_state_size = int.from_bytes(extra[:8])
    snapshot = Snapshot(
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
    return snapshot, _ENTRY.size + kept + id_length + name_length


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
        while len(self._read) < length:
            self._read += await read_bytes(self._file, self._at, _PIECE)
            self._at += _PIECE
        found, self._read = self._read[:length], self._read[length:]
        return found

    def skip(self, length: int) -> None:
        """Without looking at them."""
        self.taken += length
        self._at += max(length - len(self._read), 0)
        self._read = self._read[length:]


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
        BlockError: the child's errno; EFBIG, EINVAL: an L1 table cannot be where it is said to be.
        ImageError: the table of snapshots is too large.
    """
    found: set[int] = set()
    for snapshot in (await load_snapshots(file, header)).snapshots:
        snapshot.check_l1(header.cluster_size)
        l1 = await read_table(file, snapshot.l1_offset, snapshot.l1_entries)
        found.update(entry & OFFSET_MASK for entry in l1)
    return found - {0}
