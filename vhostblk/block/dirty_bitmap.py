"""Dirty bitmaps: named records of what was written to a node (block layer row B29).

Theory of operation: the bits are a `DirtyMap`, which the pipeline and the engine mark while the bitmap is enabled.
Whoever works on a bitmap makes it *busy*, and may give it a successor that records what comes meanwhile: if the work
succeeds the successor takes the bitmap's place (`abdicate`), if it fails the bitmap takes back all that the successor
has (`reclaim`). None of these lets a write slip by. A *persistent* bitmap is kept by the node's image, when the image
is closed; one that it could not keep is *inconsistent*, and good for nothing but to be removed.

Knows nothing about image formats: `Driver.driver_check_bitmap`, `driver_remove_bitmap`.

Context: the control loop.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from vhostblk.block.dirty_map import DirtyMap, collect, record, stop_recording
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.limits import SECTOR_SIZE
from vhostblk.block.quiesce import drained
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph
    from vhostblk.block.node import BlockNode

MAX_NAME = 1023
"""Bytes of a bitmap's name."""
_LEAST_DEFAULT = 4 << 10
_LARGEST_DEFAULT = 64 << 10


@lean_dataclass(frozen=True, slots=True)
class DirtyInfo:
    """A bitmap, as QEMU's `BlockDirtyInfo`.

    Attributes:
        count: bytes in granules that are dirty.
        granularity: bytes.
        recording: writes are recorded, here or in a successor.
        status: "frozen" (somebody works on it), "disabled" or "active", the first of these that holds (row B29.2).
    """

    name: str | None
    count: int
    granularity: int
    recording: bool
    busy: bool
    persistent: bool
    inconsistent: bool
    status: str


class DirtyBitmap:
    """One bitmap; made by `add_bitmap`, or by a driver that has loaded it.

    Attributes:
        name: None: nobody can find it.
        busy: somebody works on it.
        readonly: the image cannot keep changes for now, so there must not be any.
    """

    def __init__(
        self,
        node: BlockNode,
        name: str | None,
        dirty: DirtyMap,
        *,
        enabled: bool = True,
        persistent: bool = False,
        inconsistent: bool = False,
        readonly: bool = False,
    ) -> None:
        self.node = node
        self.name = name
        self.map = dirty
        self.enabled = enabled
        self.busy = False
        self.persistent = persistent
        self.inconsistent = inconsistent
        self.readonly = readonly
        self.successor: DirtyBitmap | None = None

    def __repr__(self) -> str:
        return f"<dirty bitmap '{self.name}' of node '{self.node.node_name}'>"

    @property
    def granularity(self) -> int:
        """Bytes for each bit."""
        return self.map.granularity

    @property
    def is_recording(self) -> bool:
        """Whether writes are recorded, here or in the successor."""
        return self.enabled or bool(self.successor and self.successor.enabled)

    @property
    def status(self) -> str:
        """See `DirtyInfo`."""
        if self.successor is not None:
            return "frozen"
        return "active" if self.enabled else "disabled"

    def check(self, *, for_reading: bool = False) -> None:
        """Refuse to use a bitmap that somebody works on, or that nobody may change.

        Args:
            for_reading: it need not be writable.

        Raises:
            ConfigError: why.
        """
        if self.busy or self.successor is not None:
            raise ConfigError(
                f"Bitmap '{self.name}' is currently in use by another operation and cannot be used",
                errno.EBUSY,
            )
        if self.readonly and not for_reading:
            raise ConfigError(
                f"Bitmap '{self.name}' is readonly and cannot be modified", errno.EPERM
            )
        if self.inconsistent:
            what = f"Bitmap '{self.name}' is inconsistent and cannot be used"
            hint = "ry block-dirty-bitmap-remove to delete this bitmap from disk"
            raise ConfigError(f"{what}; t{hint}", qemu_text=f"{what}\nT{hint}")

    # ------------------------------------------------------------------ bits

    def collect(self) -> None:
        """Get what was written past the pipeline, before bits are looked at."""
        if self.enabled:
            collect(self.node)

    def count(self) -> int:
        """Bytes in granules that are dirty (row B29.10)."""
        self.collect()
        return self.map.count()

    def is_dirty(self, offset: int) -> bool:
        """Whether the granule that has this byte is."""
        self.collect()
        return self.map.is_dirty(offset)

    def ranges(self) -> Iterator[tuple[int, int]]:
        """What is dirty: offset and length in bytes, in order; nothing may change meanwhile."""
        self.collect()
        return self.map.ranges()

    def mark(self, offset: int, length: int) -> None:
        """Every granule that the range touches is dirty; of a bitmap that may be changed."""
        assert not self.readonly
        assert not self.inconsistent
        self.map.mark(offset, length)

    def reset(self, offset: int, length: int) -> None:
        """Every granule in the range is clean; both are multiples of granules, or the range goes to the end."""
        assert not self.readonly
        assert not self.inconsistent
        self.collect()
        self.map.unmark(offset, length)

    def clear(self) -> bytes:
        """Nothing is dirty; returns what was, for `restore` (row B29.13)."""
        self.check()
        self.collect()
        before = self.map.to_bytes()
        self.map.load(b"")
        return before

    def restore(self, before: bytes) -> None:
        """Undo `clear`, or `merge_bitmaps`: forgets what was written since."""
        self.check()
        self.collect()
        self.map.load(before)

    # ------------------------------------------------------------------ whether it records

    async def enable(self) -> None:
        """Record from when this returns (row B29.9); raises ConfigError as `check`."""
        self.check()
        if not self.enabled:
            self.enabled = True
            await record(self.node, self.map)

    async def disable(self) -> None:
        """Record nothing more, but all that ended before the call; raises ConfigError as `check`."""
        self.check()
        if self.enabled:
            self.enabled = False
            await stop_recording(self.node, self.map)

    # ------------------------------------------------------------------ successors

    def create_successor(self) -> DirtyBitmap:
        """Freeze; what comes is recorded by the successor, if this one records (row B29.4).

        Raises:
            ConfigError: as `check`; EBUSY if it has one.
        """
        self.check()
        child = DirtyBitmap(
            self.node, None, DirtyMap(self.map.length, self.granularity), enabled=self.enabled
        )
        self._replace_by(child)
        self.enabled = False
        self.node.bitmaps.insert(0, child)
        self.successor, self.busy = child, True
        return child

    def abdicate(self) -> DirtyBitmap:
        """The work has succeeded: the successor takes the name, this one is no more (row B29.5).

        Raises:
            ConfigError: there is no successor.
        """
        child = self._take_successor("relinquish control")
        child.name, child.persistent = self.name, self.persistent
        self.node.bitmaps.remove(child)
        self.node.bitmaps[self.node.bitmaps.index(self)] = child
        self.name, self.persistent = None, False
        return child

    def reclaim(self) -> None:
        """The work has failed: what the successor has is this one's, which records if the successor did (row B29.6).

        Raises:
            ConfigError: there is no successor.
        """
        child = self._take_successor("reclaim a successor")
        child._replace_by(self)
        self.enabled, child.enabled = child.enabled, False
        self.map.merge(child.map)
        self.node.bitmaps.remove(child)

    def _take_successor(self, what: str) -> DirtyBitmap:
        child = self.successor
        if child is None:
            raise ConfigError(f"Cannot {what} if there's no successor present")
        self.successor, self.busy = None, False
        return child

    def _replace_by(self, other: DirtyBitmap) -> None:
        """The other one records from now on, if this one does; no write is missed, none recorded twice."""
        if self.enabled:
            collect(self.node)
            maps = self.node.write_log.dirty_maps
            maps[maps.index(self.map)] = other.map


# ---------------------------------------------------------------------- of a node


def default_granularity(node: BlockNode) -> int:
    """Bytes (row B29.12)."""
    if not node.cluster_size:
        return _LARGEST_DEFAULT
    return min(max(node.cluster_size, _LEAST_DEFAULT), _LARGEST_DEFAULT)


def find_bitmap(node: BlockNode, name: str) -> DirtyBitmap:
    """The bitmap of this name.

    Raises:
        ConfigError: ENOENT.
    """
    for bitmap in node.bitmaps:
        if bitmap.name == name:
            return bitmap
    raise ConfigError(f"Dirty bitmap '{name}' not found", errno.ENOENT)


async def add_bitmap(
    graph: BlockGraph,
    node: BlockNode,
    name: str | None,
    granularity: int | None = None,
    *,
    persistent: bool = False,
    enabled: bool = True,
) -> DirtyBitmap:
    """A new bitmap: all is clean; writes are recorded from when this returns.

    Args:
        name: unique; None: nobody else finds it.
        granularity: bytes for each bit; None: what suits the node.
        persistent: the image keeps it, once it is closed.

    Raises:
        ConfigError: EEXIST: the name is taken; ENOTSUP: the image cannot keep it; EINVAL.
        BlockError: the node's length is not known.
    """
    if not name and (persistent or name is not None):
        raise ConfigError("Bitmap name cannot be empty")
    if granularity is None:
        granularity = default_granularity(node)
    if granularity < SECTOR_SIZE or granularity.bit_count() != 1:
        raise ConfigError(f"Granularity must be power of 2 and at least {SECTOR_SIZE}")
    async with graph.changing():
        if any(name is not None and bitmap.name == name for bitmap in node.bitmaps):
            raise ConfigError(f"Bitmap already exists: {name}", errno.EEXIST)
        if persistent:
            node.driver_check_bitmap(name or "", granularity)
        if name is not None and len(name.encode(errors="surrogateescape")) > MAX_NAME:
            raise ConfigError(f"Bitmap name too long: {name}")
        await node.refresh_length()
        bitmap = DirtyBitmap(
            node, name, DirtyMap(node.length, granularity), enabled=enabled, persistent=persistent
        )
        node.bitmaps.insert(0, bitmap)
        if enabled:
            await record(node, bitmap.map)
        return bitmap


async def remove_bitmap(graph: BlockGraph, bitmap: DirtyBitmap) -> None:
    """Forget a bitmap, also in the image; one that is not the node's any more is left alone (row B29.9).

    Raises:
        ConfigError: EBUSY: somebody works on it; EPERM: the image cannot be written.
        BlockError: the image could not be changed; the bitmap is still there.
    """
    node = bitmap.node
    async with graph.changing():
        if bitmap not in node.bitmaps:
            return
        if bitmap.busy or bitmap.successor is not None:
            bitmap.check()
        if bitmap.persistent:
            if node.read_only or node.inactive:
                raise ConfigError(
                    f"Bitmap '{bitmap.name}' is readonly and cannot be modified", errno.EPERM
                )
            async with drained(node):
                await node.driver_remove_bitmap(bitmap.name or "")
        release_bitmap(bitmap)
        await node.revoke(0, node.length)


def release_bitmap(bitmap: DirtyBitmap) -> None:
    """Take a bitmap from its node; nobody works on it."""
    if bitmap.enabled:
        collect(bitmap.node)
        bitmap.node.write_log.dirty_maps.remove(bitmap.map)
    bitmap.enabled = False
    bitmap.node.bitmaps.remove(bitmap)


def merge_bitmaps(target: DirtyBitmap, sources: Iterable[DirtyBitmap]) -> bytes:
    """What is dirty in one of the sources is dirty in the target; returns what was, for `restore`.

    Raises:
        ConfigError: one cannot be used, or is of another size; nothing has changed.
    """
    found = list(sources)
    target.check()
    for source in found:
        source.check(for_reading=True)
        if source.map.length != target.map.length:
            raise ConfigError(
                f"Bitmaps are of different sizes (destination size is {target.map.length}, source size is "
                f"{source.map.length}) and can't be merged"
            )
    for one in (target, *found):
        one.collect()
    before = target.map.to_bytes()
    for source in found:
        target.map.merge(source.map)
    return before


def query_bitmaps(node: BlockNode) -> list[DirtyInfo]:
    """All bitmaps of a node, the latest one first (row B29.10)."""
    return [
        DirtyInfo(
            name=bitmap.name,
            count=bitmap.count(),
            granularity=bitmap.granularity,
            recording=bitmap.is_recording,
            busy=bitmap.busy,
            persistent=bitmap.persistent,
            inconsistent=bitmap.inconsistent,
            status=bitmap.status,
        )
        for bitmap in node.bitmaps
    ]


def check_resizable(node: BlockNode) -> None:
    """Refuse a new length while somebody works on a bitmap (row B29.8).

    Raises:
        BlockError: EBUSY.
    """
    for bitmap in node.bitmaps:
        if bitmap.busy or bitmap.successor is not None:
            raise BlockError(errno.EBUSY, f"{node.node_name}: bitmap '{bitmap.name}' is in use")
