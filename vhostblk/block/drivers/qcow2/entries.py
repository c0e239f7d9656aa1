"""What an entry of an L2 table says about a cluster (qcow2 specification, "Cluster mapping" and "Extended L2 Entries").

Numbers in, facts out. An entry is one number, or two where the image has subclusters. Knows nothing about files.
"""

from __future__ import annotations

import enum
import errno
from array import array
from dataclasses import replace
from types import MappingProxyType

from vhostblk.block.drivers.qcow2.header import SUBCLUSTERS, Header
from vhostblk.block.drivers.qcow2.tables import Table, count_alike
from vhostblk.block.flags import StatusFlag
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import BlockError, ImageError

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
"""Of an entry without subclusters: the cluster reads as zeroes."""
OFFSET_MASK = 0x00FF_FFFF_FFFF_FE00
# Bits of an L1 entry, and of a standard descriptor, that have no meaning yet.
L1_RESERVED = 0x7F00_0000_0000_01FF
_SECTOR = 512
# Whatever is behind that much, the tables of no file are long enough for it to get behind what an entry can say.
_FAR = 1 << 55
_ALL = (1 << SUBCLUSTERS) - 1
_IS_DATA, _IS_ZERO, _HAS_PLACE = map(
    int, (StatusFlag.DATA, StatusFlag.ZERO, StatusFlag.OFFSET_VALID)
)
_IS_COMPRESSED = int(StatusFlag.DATA | StatusFlag.COMPRESSED)
# Clusters that are compared at first, to see whether a run goes on.
_FIRST_PIECE = 16


class Kind(enum.Enum):
    """Where the bytes of a subcluster come from; without subclusters a cluster is one."""

    UNALLOCATED = "unallocated"  # the backing file, or zeroes
    ZERO = "zero"
    NORMAL = "normal"
    COMPRESSED = "compressed"


@lean_dataclass(frozen=True, slots=True)
class Run:
    """Bytes of the disk that come from the same place, in one piece.

    Attributes:
        start, end: on the disk.
        host: where `start` is in the file that has the data; 0 where there is no such place. NORMAL always has one; the
            others have one if room was allocated for them.
        copied: nobody else uses the host cluster, so it may be written.
        compressed: how many bytes from `host` on have the compressed cluster, at most.
    """

    kind: Kind
    start: int
    end: int
    host: int = 0
    has_host: bool = False
    compressed: int = 0
    copied: bool = False


STATUS_FLAGS = MappingProxyType(
    {
        Kind.UNALLOCATED: 0,
        Kind.ZERO: _IS_ZERO,
        Kind.NORMAL: _IS_DATA,
        Kind.COMPRESSED: _IS_COMPRESSED,
    }
)
"""What a kind is in block status."""


class EntryError(ImageError):
    """An entry makes no sense.

    Args:
        what: is wrong.
        guest_offset: of the cluster on the disk.
    """

    def __init__(self, what: str, guest_offset: int) -> None:
        super().__init__(f"{what} (guest offset {guest_offset:#x})")
        self.what = what
        self.guest_offset = guest_offset

    def in_table(self, table: int, index: int) -> ImageError:
        """The same, for whoever knows the table, and the entry's number in its slice: in the words of QEMU."""
        place = [f"{number:#x}" if number else "0" for number in (table, index)]
        return ImageError(f"{self.what} (L2 offset: {place[0]}, L2 index: {place[1]})")


class EntryReader:
    """Reads entries of one image."""

    def __init__(self, header: Header) -> None:
        self._cluster_bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._extended = header.has_subclusters
        self._subcluster_size = header.subcluster_size
        self._has_data_file = header.has_data_file
        self._has_zeroes = header.version >= 3 and not header.has_subclusters
        # "Compressed Clusters Descriptor".
        self._offset_bits = 62 - (header.cluster_bits - 8)

    def run_at(self, table: Table, base: int, offset: int, limit: int, since: int = 0) -> Run:
        """The longest run around `offset`, within what the table covers.

        Args:
            table: entries; those with subclusters take two numbers each.
            base: what the first entry is for: bytes on the disk.
            limit: no need to look behind this; the run may end there.
            since: no need to look before this.

        Raises:
            ImageError: the entry at `offset` is wrong.
        """
        run = self.part_at(table, base, offset)
        if run.kind is Kind.COMPRESSED:
            return run
        size = self._cluster_size
        count = len(table) // (2 if self._extended else 1)
        stop = min(-(-(limit - base) // size), count)
        run = self._grown(run, table, base, stop)
        while run.end < min(limit, base + count * size):
            following = self._neighbour(table, base, run.end)
            if following is None or not _continues(run, following):
                break
            following = self._grown(following, table, base, stop)
            run = replace(run, end=following.end)
        least = max((since - base) // size, 0)
        run = self._grown_back(run, table, base, least)
        while run.start > max(base, since):
            before = self._neighbour(table, base, run.start - 1)
            if before is None or not _continues(before, run):
                break
            before = self._grown_back(before, table, base, least)
            run = replace(run, start=before.start, host=before.host)
        return run

    # Most runs are long. Numbers are compared many at a time: neighbours of a whole cluster that are more of the same
    # have the same entry, but for where the cluster is.

    def _grown(self, run: Run, table: Table, base: int, stop: int) -> Run:
        """A run that ends with a whole cluster, with clusters behind it that are more of it, below number `stop`."""
        size = self._cluster_size
        first = (run.end - base >> self._cluster_bits) - 1
        if (run.end - base) % size or run.end - run.start < size:
            return run
        step = size if run.has_host else 0
        # Sums stay numbers that an entry can have.
        if step:
            last_host = run.host + run.end - run.start - size
            stop = min(stop, first + (OFFSET_MASK - last_host >> self._cluster_bits))
        done, piece = first + 1, _FIRST_PIECE
        while done < stop:
            last = min(done + piece, stop)
            differs = self._differs(table, first, done, last, step)
            if differs:
                done += differs.index(True)
                break
            done, piece = last, piece * 4
        if done == first + 1:
            return run
        # Not by `replace`, which takes longer than all of this.
        return Run(
            run.kind,
            run.start,
            base + done * size,
            run.host,
            run.has_host,
            run.compressed,
            run.copied,
        )

    def _grown_back(self, run: Run, table: Table, base: int, least: int) -> Run:
        """The same to the other side, from number `least` on."""
        size = self._cluster_size
        last = run.start - base >> self._cluster_bits
        if (run.start - base) % size or run.end - run.start < size:
            return run
        step = size if run.has_host else 0
        if step:
            # Place 0 is none, but in an external data file.
            least = max(least, last - (run.host >> self._cluster_bits) + (not self._has_data_file))
        done, piece = last, _FIRST_PIECE
        while done > least:
            first = max(done - piece, least)
            differs = self._differs(table, last, first, done, step)
            if differs:
                done = first + len(differs) - differs[::-1].index(True)
                break
            done, piece = first, piece * 4
        if done == last:
            return run
        return replace(
            run, start=base + done * size, host=run.host - (last - done) * step if step else 0
        )

    def _differs(self, table: Table, known: int, first: int, last: int, step: int) -> list[bool]:
        """Which of the clusters `first`..`last` are not more of the same as `known`; empty if all are."""
        each = 2 if self._extended else 1
        entry = table[each * known] + (first - known) * step
        count = last - first
        alike = array("Q", range(entry, entry + count * step, step) if step else [entry])
        if not step:
            alike *= count
        found = table[each * first : each * last : each]
        if not self._extended:
            return [] if found == alike else [a != b for a, b in zip(found, alike, strict=True)]
        bitmaps = table[each * first + 1 : each * last : each]
        whole = array("Q", [table[each * known + 1]]) * count
        if found == alike and bitmaps == whole:
            return []
        pairs = zip(found, alike, bitmaps, whole, strict=True)
        return [a != b or c != d for a, b, c, d in pairs]

    def _neighbour(self, table: Table, base: int, offset: int) -> Run | None:
        """None if the entry is wrong: that is the business of whoever reads there."""
        try:
            return self.part_at(table, base, offset)
        except ImageError:
            return None

    def part_at(self, table: Table, base: int, offset: int) -> Run:
        """What one entry says of the subclusters around `offset` that are alike.

        Raises:
            ImageError: it is wrong.
        """
        index = (offset - base) >> self._cluster_bits
        start = base + (index << self._cluster_bits)
        entry = table[2 * index] if self._extended else table[index]
        if entry & COMPRESSED:
            return self._compressed(entry, start)
        host = entry & OFFSET_MASK
        copied = bool(entry & COPIED)
        # In an external data file 0 is a place like any other. But zeroes there have none, as in QEMU.
        is_zero = entry & ZERO and not self._extended
        has_host = bool(host or (self._has_data_file and copied and not is_zero))
        copied = copied and has_host
        if host & (self._cluster_size - 1):
            raise EntryError(f"Cluster allocation offset {host:#x} unaligned", start)
        if self._has_data_file and has_host and host != start:
            raise EntryError(
                f"External data file host cluster offset {host:#x} does not match guest cluster offset: {start:#x}",
                start,
            )
        if self._extended:
            return self._subclusters(table[2 * index + 1], start, offset, host, has_host, copied)
        if entry & ZERO and self._has_zeroes:
            kind = Kind.ZERO
        elif entry & ZERO:
            raise EntryError("Zero cluster entry found in pre-v3 image", start)
        else:
            kind = Kind.NORMAL if has_host else Kind.UNALLOCATED
        return Run(kind, start, start + self._cluster_size, host, has_host, copied=copied)

    def _subclusters(
        self, bitmap: int, start: int, offset: int, host: int, has_host: bool, copied: bool
    ) -> Run:
        allocated, zero = bitmap & _ALL, bitmap >> SUBCLUSTERS
        if allocated & zero:
            raise EntryError("Invalid cluster entry found ", start)
        if allocated and not has_host:
            raise EntryError("Invalid cluster entry found ", start)
        first = (offset - start) // self._subcluster_size
        if allocated >> first & 1:
            kind, alike = Kind.NORMAL, allocated
        elif zero >> first & 1:
            kind, alike = Kind.ZERO, zero
        else:
            kind, alike = Kind.UNALLOCATED, ~(allocated | zero) & _ALL
        last = first + 1
        while last < SUBCLUSTERS and alike >> last & 1:
            last += 1
        while first and alike >> first - 1 & 1:
            first -= 1
        skip = first * self._subcluster_size
        return Run(
            kind,
            start + skip,
            start + last * self._subcluster_size,
            host + skip if has_host else 0,
            has_host,
            copied=copied,
        )

    def statuses(
        self, table: Table, base: int, offset: int, limit: int
    ) -> list[tuple[int, int, int]]:
        """Block status of runs from `offset` on, within what the table covers: flags, bytes, place in the file.

        It is by far the fastest way to see all of a table.

        Args:
            table, base: as for `run_at`.
            limit: nothing behind this is told of.

        Raises:
            EntryError: the first entry is wrong; the list ends before any other that is.
        """
        if self._extended or self._has_data_file:
            return self._statuses_of_parts(table, base, offset, limit)
        size, bits = self._cluster_size, self._cluster_bits
        index = offset - base >> bits
        stop = min(-(-(limit - base) // size), len(table))
        zero = ZERO if self._has_zeroes else 0
        found: list[tuple[int, int, int]] = []
        run_flags, next_place = -1, 0
        number = index
        while number < stop:
            entry, first = table[number], number
            number += 1
            if not entry:
                flags = place = step = 0
            elif entry & COMPRESSED:
                flags, place, step = _IS_COMPRESSED, 0, -1
            else:
                place = entry & OFFSET_MASK
                if place & size - 1 or entry & ZERO & ~zero:
                    stop = first
                    break
                flags = _IS_ZERO if entry & zero else _IS_DATA if place else 0
                step = 0
                if place:
                    flags |= _HAS_PLACE
                    step = size if place <= _FAR else -1
            if step >= 0 and number < stop and table[number] == entry + step:
                number = min(first + count_alike(table, first, entry, step), stop)
            count = number - first << bits
            if flags == run_flags and place == next_place and not entry & COMPRESSED:
                # Who else uses the clusters does not matter here.
                flags, before, place = found.pop()
                count += before
            found.append((flags, count, place))
            run_flags, next_place = flags, place + count if flags & _HAS_PLACE else 0
        if not found:
            self.part_at(table, base, offset)
        # The first begins, and the last ends, inside a cluster perhaps.
        if skip := offset - base - (index << bits):
            flags, count, place = found[0]
            found[0] = flags, count - skip, place + skip if flags & _HAS_PLACE else 0
        if (over := base + (stop << bits) - limit) > 0:
            flags, count, place = found[-1]
            found[-1] = flags, count - over, place
        return found

    def _statuses_of_parts(
        self, table: Table, base: int, offset: int, limit: int
    ) -> list[tuple[int, int, int]]:
        """The same, where an entry takes more than a look: of subclusters, of an external data file."""
        size, bits = self._cluster_size, self._cluster_bits
        each = 2 if self._extended else 1
        clusters = len(table) // each
        limit = min(limit, base + (clusters << bits))
        stop = -(-(limit - base) // size)
        found: list[tuple[int, int, int]] = []
        last = next_place = -1
        while offset < limit:
            try:
                run = self.part_at(table, base, offset)
            except EntryError:
                if found:
                    break
                raise
            number = run.end - base >> bits
            if run.end - run.start == size and number < stop:
                before = table[each * number - each]
                if table[each * number] == before + (size if run.has_host else 0):
                    run = self._grown(run, table, base, stop)
            count = min(run.end, limit) - offset
            flags = STATUS_FLAGS[run.kind]
            place = 0
            if run.has_host and run.kind is not Kind.COMPRESSED:
                flags |= _HAS_PLACE
                place = run.host + offset - run.start
            offset += count
            if flags == last and place == next_place and run.kind is not Kind.COMPRESSED:
                flags, before, place = found.pop()
                count += before
            found.append((flags, count, place))
            last, next_place = flags, place + count if flags & _HAS_PLACE else 0
        return found

    def compressed_place(self, entry: int) -> tuple[int, int]:
        """Where the data of a compressed cluster are, and how many bytes they are at most."""
        descriptor = entry & (COMPRESSED - 1)
        host = descriptor & ((1 << self._offset_bits) - 1)
        sectors = (descriptor >> self._offset_bits) + 1
        return host, sectors * _SECTOR - host % _SECTOR

    def compressed_entry(self, host: int, length: int) -> int:
        """The entry of a cluster whose compressed data are at `host`.

        Raises:
            BlockError: EFBIG: that is too far behind.
        """
        last = host + length - 1
        if last >> self._offset_bits:
            raise BlockError(errno.EFBIG, "compressed clusters cannot be that far behind")
        sectors = last // _SECTOR - host // _SECTOR
        return COMPRESSED | sectors << self._offset_bits | host

    def _compressed(self, entry: int, start: int) -> Run:
        if self._has_data_file:
            raise EntryError(
                "Compressed cluster entry found in image with external data file", start
            )
        host, length = self.compressed_place(entry)
        return Run(
            Kind.COMPRESSED,
            start,
            start + self._cluster_size,
            host,
            has_host=True,
            compressed=length,
        )


def _continues(one: Run, other: Run) -> bool:
    """Whether the other, which begins where the first ends, is more of the same."""
    return (
        one.kind is other.kind
        and one.kind is not Kind.COMPRESSED
        and one.has_host == other.has_host
        and one.copied == other.copied
        and (not one.has_host or one.host + one.end - one.start == other.host)
    )
