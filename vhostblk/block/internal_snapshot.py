"""Internal snapshots: states of a disk that its image keeps (block layer row B36).

The one interface for jobs and tools; a driver that has snapshots overrides `Driver.driver_snapshot_*`. Filters, and
formats that only show what is below, pass everything on. Whoever uses the node is kept waiting, and the guest's extents
are taken back.

A guest's state (RAM, devices) is neither saved nor loaded: there is no guest here. What others have saved stays
as it is. What *copy-before-write* keeps is another thing: `snapshot.py`.
"""

from __future__ import annotations

import errno
import os
import time
from typing import TYPE_CHECKING

from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, check_op
from vhostblk.block.permissions import Perm
from vhostblk.block.quiesce import drained
from vhostblk.block.roles import Role
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph

MAX_NAME = 255
"""Bytes of a name that everybody shows whole; an ID may have half as many."""
MAX_ID = 127


@lean_dataclass(frozen=True, slots=True)
class SnapshotInfo:
    """A snapshot, as QEMU's `SnapshotInfo`.

    Attributes:
        id: unique; empty: one is made up.
        name: may be that of others, too.
        seconds, nanoseconds: when it was taken, since 1970.
        vm_clock: how long the guest had been running, in nanoseconds.
        vm_state_size: bytes of the guest's saved state; 0: there is none.
        disk_size: bytes, at that time.
        icount: instructions that the guest had executed; None: nobody has counted.
    """

    id: str
    name: str
    seconds: int = 0
    nanoseconds: int = 0
    vm_clock: int = 0
    vm_state_size: int = 0
    disk_size: int = 0
    icount: int | None = None


def snapshot_node(node: BlockNode, qemu_text: str = "") -> BlockNode:
    """The node that has the snapshots: this one, or the one whose content it shows.

    Args:
        qemu_text: what QEMU's tools say where there is none.

    Raises:
        ConfigError: ENOTSUP: there is none.
    """
    found = node
    while not found.has_internal_snapshots:
        edges = [edge for edge in found.children.values() if not edge.role & Role.COW]
        if len(edges) != 1 or not edges[0].role & (Role.PRIMARY | Role.FILTERED):
            raise ConfigError(
                f"Block format '{node.driver_name}' used by node '{node.node_name}' does not support "
                "internal snapshots",
                errno.ENOTSUP,
                qemu_text=qemu_text,
            )
        found = edges[0].node
    return found


async def list_snapshots(node: BlockNode) -> tuple[SnapshotInfo, ...]:
    """All snapshots, in the order of the image.

    Raises:
        ConfigError: ENOTSUP; or the image is damaged.
    """
    try:
        return await snapshot_node(node).driver_snapshots()
    except BlockError as error:
        raise _failed("Could not read the snapshots", error) from None


async def create_snapshot(
    graph: BlockGraph,
    node: BlockNode,
    name: str,
    id_: str = "",
    *,
    date: int | None = None,
    icount: int | None = None,
) -> SnapshotInfo:
    """Keep what the disk shows now.

    Args:
        id_: None may have it yet; empty: one is made up.
        date: nanoseconds since 1970; None: now. icount: what is said of the guest's instructions.

    Raises:
        ConfigError: EEXIST: the ID is taken; ENOTSUP, EPERM, EBUSY: not here, or not now; else what failed. Nothing has
            changed.
    """
    if len(name.encode(errors="surrogateescape")) > MAX_NAME:
        raise ConfigError("Snapshot name is too long")
    if len(id_.encode(errors="surrogateescape")) > MAX_ID:
        raise ConfigError("Snapshot ID is too long")
    seconds, nanoseconds = divmod(time.time_ns() if date is None else date, 10**9)
    async with graph.changing():
        found = _writable(node, OpType.INTERNAL_SNAPSHOT)
        async with drained(found):
            try:
                return await found.driver_snapshot_create(
                    SnapshotInfo(id_, name, seconds, nanoseconds, icount=icount)
                )
            except BlockError as error:
                raise _failed("Could not create snapshot", error) from None


async def delete_snapshot(
    graph: BlockGraph, node: BlockNode, id_: str | None = None, name: str | None = None
) -> SnapshotInfo:
    """Forget a snapshot: the one with this ID and this name, where they are given; returns what it was.

    Raises:
        ConfigError: ENOENT: there is none; else as `create_snapshot`.
    """
    if id_ is None and name is None:
        raise ConfigError("snapshot_id and name are both NULL")
    async with graph.changing():
        found = _writable(node, OpType.INTERNAL_SNAPSHOT_DELETE)
        async with drained(found):
            try:
                return await found.driver_snapshot_delete(id_, name)
            except BlockError as error:
                raise _failed("Could not delete snapshot", error) from None


async def go_to_snapshot(graph: BlockGraph, node: BlockNode, id_or_name: str) -> None:
    """The disk shows what a snapshot has, and is as long as then; an ID comes before a name.

    Raises:
        ConfigError: ENOENT: there is no such snapshot; EBUSY: there are dirty bitmaps, which would not know; else as
            `create_snapshot`.
    """
    async with graph.changing():
        found = _writable(node, OpType.INTERNAL_SNAPSHOT, "Block driver does not support snapshots")
        if any(above.bitmaps for above in _shown_by(found)):
            raise ConfigError("Device has active dirty bitmaps", errno.EBUSY)
        try:
            wanted = _find(await list_snapshots(found), id_or_name)
        except ConfigError as error:
            raise _not_loaded(str(error), error.errno) from None
        if wanted.disk_size != found.length:
            for edge in found.parents:
                if not edge.shared & Perm.RESIZE:
                    raise ConfigError(
                        f"The disk was {wanted.disk_size} bytes long then, and {edge.describe()} does not allow "
                        f"'resize' on node '{found.node_name}'",
                        errno.EPERM,
                    )
        async with drained(found):
            try:
                await found.driver_snapshot_goto(wanted.id)
            except BlockError as error:
                what = f"Could not apply snapshot: {error.strerror}"
                raise _not_loaded(what, error.errno or errno.EIO) from None


async def load_snapshot(
    graph: BlockGraph, node: BlockNode, id_: str | None = None, name: str | None = None
) -> SnapshotInfo:
    """Let a read-only node show a snapshot, until it is closed; the image stays as it is.

    Raises:
        ConfigError: ENOENT: there is none with this ID and this name, where they are given; EINVAL: the node is not
            read-only; ENOTSUP.
    """
    if id_ is None and name is None:
        raise ConfigError("snapshot_id and name are both NULL")
    async with graph.changing():
        found = snapshot_node(
            node,
            f"Block format '{node.driver_name}' used by device '' does not support temporarily loading "
            "internal snapshots",
        )
        if not found.read_only:
            raise ConfigError("Device is not readonly")
        async with drained(found):
            try:
                return await found.driver_snapshot_load(id_, name)
            except BlockError as error:
                failed = _failed("Could not load snapshot", error)
                if failed.errno == errno.ENOENT:
                    failed.qemu_text = "Can't find snapshot"
                raise failed from None


def _writable(node: BlockNode, operation: OpType, qemu_text: str = "") -> BlockNode:
    check_op(node, operation)
    found = snapshot_node(node, qemu_text)
    check_op(found, operation)
    if found.read_only or found.inactive:
        why = "read-only" if found.read_only else "inactive"
        raise ConfigError(f"Node '{found.node_name}' is {why}", errno.EPERM)
    return found


def _find(snapshots: tuple[SnapshotInfo, ...], id_or_name: str) -> SnapshotInfo:
    for names in ([one.id for one in snapshots], [one.name for one in snapshots]):
        if id_or_name in names:
            return snapshots[names.index(id_or_name)]
    raise ConfigError(f"Can't find snapshot '{id_or_name}'", errno.ENOENT)


def _shown_by(node: BlockNode) -> list[BlockNode]:
    """The node, and those above that show the same bytes."""
    found = [node]
    for edge in node.parents:
        above = edge.parent
        if isinstance(above, BlockNode) and edge.role & (Role.PRIMARY | Role.FILTERED):
            found += _shown_by(above)
    return found


def _failed(what: str, error: BlockError) -> ConfigError:
    text = error.strerror or str(error)
    return ConfigError(f"{what}: {text}", error.errno or errno.EIO, qemu_text=text)


def _not_loaded(what: str, number: int) -> ConfigError:
    return ConfigError(what, number, qemu_text=f"Failed to load snapshot: {os.strerror(number)}")
