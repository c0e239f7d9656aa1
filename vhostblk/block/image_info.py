"""What is known about an image: `ImageInfo` of QEMU's QMP reference (block layer row B41.6), for QMP and image tools.

One image each; those that it is backed by are others. What only a format knows of its images it says in
`Driver.driver_format_info`. Knows nothing about how people are told: `cli/image_info_text.py`.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import Any

from vhostblk.block.filename import is_absolute, protocol_prefix
from vhostblk.block.internal_snapshot import SnapshotInfo, list_snapshots
from vhostblk.block.introspection import directory, filename
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.node import BlockNode
from vhostblk.errors import BlockError, ConfigError

# QEMU has no room for longer names.
_MOST_NAME = 4095


@lean_dataclass(frozen=True, slots=True)
class FormatInfo:
    """What only a format knows of its images (`ImageInfoSpecific`).

    Attributes:
        type: the format.
        facts: by QMP's names, nested.
    """

    type: str
    facts: Mapping[str, Any]


@lean_dataclass(frozen=True, slots=True)
class ImageInfo:
    """One image. What is None is not known, or does not apply.

    Attributes:
        filename: opens it again: a plain name, or `json:` and options.
        format: the driver.
        virtual_size: bytes of the disk.
        actual_size: bytes that it takes.
        cluster_size: bytes in which it allocates.
        is_dirty: it was not closed properly.
        backing_filename: what the image says that it is backed by, as it is written there.
        full_backing_filename: the same as seen from here.
        backing_format: the driver for that, if the image says one.
        snapshots: that it keeps.
        format_info: what only the format knows.
        is_encrypted: nothing can be read without a key.
    """

    filename: str
    format: str
    virtual_size: int
    actual_size: int | None = None
    cluster_size: int | None = None
    is_dirty: bool | None = None
    backing_filename: str | None = None
    full_backing_filename: str | None = None
    backing_format: str | None = None
    snapshots: tuple[SnapshotInfo, ...] = ()
    format_info: FormatInfo | None = None
    is_encrypted: bool = False

    def to_qmp(self) -> dict[str, Any]:
        """As `ImageInfo` in QMP, without the images below."""
        answer: dict[str, Any] = {"filename": self.filename, "format": self.format}
        for name, value in (
            ("dirty-flag", self.is_dirty),
            ("actual-size", self.actual_size),
            ("virtual-size", self.virtual_size),
            ("cluster-size", self.cluster_size),
            ("encrypted", self.is_encrypted or None),
            ("backing-filename", self.backing_filename),
            ("full-backing-filename", self.full_backing_filename),
            ("backing-filename-format", self.backing_format),
        ):
            if value is not None:
                answer[name] = value
        if self.snapshots:
            answer["snapshots"] = [snapshot_to_qmp(snapshot) for snapshot in self.snapshots]
        if self.format_info is not None:
            info = self.format_info
            answer["format-specific"] = {"type": info.type, "data": info.facts}
        return answer


async def query_image_info(node: BlockNode) -> ImageInfo:
    """What is known about the image in this node.

    Raises:
        ConfigError: its snapshots, or what its format says of it, cannot be read.
    """
    info = node.info()
    recorded = node.recorded_backing()
    return ImageInfo(
        filename=_shown(filename(node)),
        format=node.driver_name,
        virtual_size=node.length,
        actual_size=await _allocated(node),
        cluster_size=(info.cluster_size or None) if info is not None else None,
        is_dirty=info.is_dirty if info is not None else None,
        backing_filename=recorded.filename or None,
        full_backing_filename=_full_name(node, recorded.filename),
        backing_format=(recorded.driver or None) if recorded.filename else None,
        snapshots=await _snapshots(node),
        format_info=await format_info(node),
        is_encrypted=node.is_encrypted,
    )


async def format_info(node: BlockNode) -> FormatInfo | None:
    """What only the format of this node knows; None: nothing.

    Raises:
        ConfigError: it cannot be read.
    """
    return await node.driver_format_info()


def snapshot_to_qmp(snapshot: SnapshotInfo) -> dict[str, Any]:
    """As QEMU's `SnapshotInfo`."""
    seconds, nanoseconds = divmod(snapshot.vm_clock, 10**9)
    answer: dict[str, Any] = {
        "id": snapshot.id,
        "name": snapshot.name,
        "vm-state-size": snapshot.vm_state_size,
        "date-sec": snapshot.seconds,
        "date-nsec": snapshot.nanoseconds,
        "vm-clock-sec": seconds,
        "vm-clock-nsec": nanoseconds,
    }
    if snapshot.icount is not None:
        answer["icount"] = snapshot.icount
    return answer


def _shown(name: str) -> str:
    return name if len(name) <= _MOST_NAME else f"{name[: _MOST_NAME - 3]}..."


async def _allocated(node: BlockNode) -> int | None:
    try:
        return await node.driver_allocated_size()
    except BlockError:
        return None


def _full_name(node: BlockNode, name: str) -> str | None:
    if not name or protocol_prefix(name) is not None or is_absolute(name):
        return name or None
    try:
        return directory(node) + name
    except ConfigError:
        return None


async def _snapshots(node: BlockNode) -> tuple[SnapshotInfo, ...]:
    try:
        return await list_snapshots(node)
    except ConfigError as error:
        if error.errno == errno.ENOTSUP:
            return ()
        raise ConfigError(f"Can't list snapshots of device '': {error}", error.errno) from None
