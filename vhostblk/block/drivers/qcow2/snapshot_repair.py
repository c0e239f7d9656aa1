"""The table of internal snapshots in a check: what is wrong with it, and how it is repaired.

Theory of operation: before anything is counted the table is read. One that is too large loses the snapshots at its end,
at once, in the header: what they had is leaked, and found when clusters are counted. Extra data that are too large, and
entries that do not say what version 3 wants to know, are for a new table, which is written when counts are right, to
clusters that nobody uses; then the header names it, and the counts that go with it.

Context: the control loop; nobody uses the image meanwhile.
"""

from __future__ import annotations

import errno
from dataclasses import replace

from vhostblk.block.check import CheckResult
from vhostblk.block.drivers.qcow2.header import MAX_SNAPSHOTS, Header
from vhostblk.block.drivers.qcow2.overlaps import TablePlaces
from vhostblk.block.drivers.qcow2.shadow import Shadow
from vhostblk.block.drivers.qcow2.snapshot_changes import SnapshotChange
from vhostblk.block.drivers.qcow2.snapshots import (
    Losses,
    SnapshotTable,
    SnapshotTableError,
    load_snapshots,
)
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.errors import ImageError


class SnapshotRepair:
    """One repair, or a check only.

    Args:
        result: is told what is found.
        fixes: what is wrong is going to be repaired.

    Attributes: header: with as many snapshots as there are left. is_wrong: the table has to be written anew.
    """

    def __init__(self, file: Edge, header: Header, result: CheckResult, *, fixes: bool) -> None:
        self.header = header
        self._file = file
        self._result = result
        self._fixes = fixes
        self._table = SnapshotTable()
        self._wrong = 0

    @property
    def is_wrong(self) -> bool:
        """Whether the table has to be written anew."""
        return bool(self._wrong)

    async def load(self) -> SnapshotTable | None:
        """Read the table; None: that cannot be done, and the check is over.

        Raises:
            BlockError: the child's errno.
        """
        header, result = self.header, self._result
        overhanging = max(header.snapshots - MAX_SNAPSHOTS, 0)
        losses = Losses(result.say)
        if overhanging and self._fixes:
            result.say(f"Discarding {overhanging} overhanging snapshots")
            losses.snapshots = overhanging
            header = replace(header, snapshots=MAX_SNAPSHOTS)
        try:
            header.check_snapshots("snapshot table")
        except ImageError as error:
            self._give_up(
                f"ERROR {error}", errno.EFBIG if header.snapshots > MAX_SNAPSHOTS else errno.EINVAL
            )
            if header.snapshots > MAX_SNAPSHOTS:
                result.say(
                    f"You can force-remove all {overhanging} overhanging snapshots"
                    " with qemu-img check -r all"
                )
            return None
        try:
            table = await load_snapshots(self._file, header, losses if self._fixes else None)
        except SnapshotTableError as error:
            self._give_up(
                f"ERROR failed to read the snapshot table: {error}\n{error.hint}", errno.EFBIG
            )
            return None
        self._table = table
        if losses.snapshots:
            self.header = replace(header, snapshots=len(table.snapshots))
            await self._write_header()
            result.corruptions_fixed += losses.snapshots
        self._wrong = losses.extra
        if header.version >= 3:
            for number, one in enumerate(table.snapshots):
                if one.disk_size is None:
                    self._wrong += 1
                    word = "Repairing" if self._fixes else "ERROR"
                    result.say(f"{word} snapshot table entry {number} is incomplete")
        return table

    def _give_up(self, message: str, number: int) -> None:
        self._result.check_errors += 1
        self._result.failure = number
        self._result.complain(message)

    def count_wrong(self) -> None:
        """What is wrong with the table, among all that is."""
        self._result.corruptions += self._wrong

    async def write(self, header: Header, places: TablePlaces) -> Header:
        """The table anew, in an image whose counts are right.

        Args:
            places: where it cannot be, whatever counts say.

        Returns: the header that names it.

        Raises:
            BlockError: the child's errno; or there is no room.
            ImageError: counts are not right.
        """
        shadow = await Shadow.load(self._file, header, places)
        change = SnapshotChange(self._file, header, shadow, places, self._table)
        fields = await change.rewrite() | await shadow.write()
        self.header = replace(header, **fields)  # type: ignore[arg-type]
        await self._file.flush()
        await self._write_header()
        self._result.corruptions -= self._wrong
        self._result.corruptions_fixed += self._wrong
        self._wrong = 0
        return self.header

    async def _write_header(self) -> None:
        await self._file.pwritev(0, IoVec.of(self.header.to_bytes()))
        await self._file.flush()
