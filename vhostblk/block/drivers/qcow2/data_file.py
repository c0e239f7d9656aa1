"""External data files: what reaches them besides what is written (qcow2 specification, "Autoclear features").

Theory of operation: in an external data file everything is where the guest sees it: a cluster has its place before it
is used, and nobody else gets that. A *raw* one can be read without the image: it shows the disk at any time. So zeroes
are written to the file, discards go to it where the disk shows what is in it, and no table changes: where tables
say zeroes, or nothing, the file has zeroes already. What is written is in the file before a table says so.

Context: the control loop. Knows nothing about tables.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from vhostblk.block.drivers.qcow2.entries import Kind, Run
from vhostblk.block.drivers.qcow2.locks import RangeLocks
from vhostblk.block.edge import Edge

FindRun = Callable[[int, int], Awaitable[Run]]


class RawDataFile:
    """A data file that shows the disk.

    Args:
        locks: of the disk's ranges.
        run: what is around an offset, up to a limit, as `Clusters.run`.
    """

    def __init__(self, data: Edge, locks: RangeLocks, run: FindRun) -> None:
        self._data = data
        self._locks = locks
        self._run = run

    async def pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """Make a range read as zeroes.

        Raises:
            BlockError: the file's errno.
        """
        async with self._locks.held(offset, offset + length, alone=False):
            await self._data.pwrite_zeroes(offset, length, flags)

    async def pdiscard(self, offset: int, length: int) -> None:
        """Give a range up.

        Raises:
            BlockError: the file's errno.
            ImageError: an entry is wrong.
        """
        at, end = offset, offset + length
        async with self._locks.held(offset, end, alone=False):
            while at < end:
                run = await self._run(at, end)
                stop = min(run.end, end)
                # Elsewhere the disk reads as zeroes, and so must the file; who discards promises nothing.
                if run.kind is Kind.NORMAL:
                    await self._data.pdiscard(at, stop - at)
                at = stop


async def forget_behind(data: Edge, old: int, new: int) -> None:
    """What a data file has behind the end of its disk is not shown when the disk grows.

    Raises:
        BlockError: the file's errno.
    """
    end = min(new, data.node.length)
    if old < end:
        await data.pwrite_zeroes(old, end - old)
