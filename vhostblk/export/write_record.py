"""What the engine has written on its own, for the block layer: how much, how far, and where if somebody asked.

Theory of operation: the engine marks one map of the disk, or none. An extent that is mapped says how fine it has to
be; a finer one, or a longer one when the disk grows, takes the place of the map before. That one may be marked for a
moment more, until every thread has answered a command that was sent later; a revocation is such a command. When all
extents are revoked nobody needs a map, until the next one is mapped that does.

Knows nothing about threads and messages.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from vhostblk import native
from vhostblk.block.extent import ExtentFlag, HostExtent, PastWrites
from vhostblk.errors import BlockError

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Retired:
    """A map that is not the engine's any more, except for ..."""

    dirty: native.DirtyMap
    may_be_marked: bool  # ... threads that have not noticed


class WriteRecord:
    """See the module.

    Args:
        disk: what the engine knows of the export.
        length: bytes of it.

    Context: the control loop.
    Owns: the maps.
    """

    def __init__(self, disk: native.Disk, length: int) -> None:
        self._disk = disk
        self._length = length
        self._current: native.DirtyMap | None = None
        self._retired: list[_Retired] = []
        self._counted = 0
        self._needs = 0  # counts extents that need a map

    def prepare(self, extents: Sequence[HostExtent]) -> None:
        """Call before extents are mapped, without a suspension in between.

        Raises:
            BlockError: ENOMEM: they must not be mapped.
        """
        wanted = [e.record for e in extents if e.record and e.flags & ExtentFlag.WRITE]
        if wanted:
            self._needs += 1
            if self._current is None or self._current.granularity > min(wanted):
                self._replace(min(wanted))

    def set_length(self, length: int) -> bool:
        """Whether the engine may be told that the disk has another length."""
        self._length = length
        if self._current is not None and self._current.length < length:
            try:
                self._replace(self._current.granularity)
            except BlockError as exc:
                log.error("what is new of the disk cannot be used: %s", exc)
                return False
        return True

    @contextmanager
    def revocation(self, is_everything: bool) -> Iterator[None]:
        """Inside, commands are sent to all threads, and answered.

        Args:
            is_everything: that they forget all extents.
        """
        retired, needs = tuple(self._retired), self._needs
        yield
        for one in retired:
            one.may_be_marked = False
        if is_everything and needs == self._needs:
            self._retire(None)
            # Marked by writes only, of which there are none without an extent.
            for one in self._retired:
                one.may_be_marked = False

    def take(self, ranges: bool) -> PastWrites:
        """What was written since the last time.

        Args:
            ranges: also where.
        """
        # In this order: whatever is counted has left its marks.
        total = self._disk.write_gen
        count, self._counted = total - self._counted, total
        return PastWrites(
            count, self._disk.take_highest_write(), self._take_ranges() if ranges else ()
        )

    def _take_ranges(self) -> list[tuple[int, int]]:
        found: list[tuple[int, int]] = []
        for one in self._retired:
            found += one.dirty.take()
        self._retired = [one for one in self._retired if one.may_be_marked]
        if self._current is not None:
            found += self._current.take()
        return found

    def _replace(self, granularity: int) -> None:
        try:
            fresh = native.DirtyMap(self._length, granularity)
        except OSError as exc:
            raise BlockError(exc.errno or errno.ENOMEM, f"dirty map: {exc.strerror}") from None
        self._retire(fresh)

    def _retire(self, successor: native.DirtyMap | None) -> None:
        if self._current is not None:
            self._retired.append(_Retired(self._current, may_be_marked=True))
        self._current = successor
        self._disk.set_dirty_map(successor)
