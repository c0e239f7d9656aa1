"""What users of a node are told that they may do alone: the driver's answers, cut by what only the pipeline knows.

Drains, serialising requests, and whoever wants to see or to remember writes. The only way to ask a node for extents.
"""

from __future__ import annotations

from vhostblk.block.dirty_map import recorded
from vhostblk.block.extent import ExtentFlag, HostExtent, Ranges, Writer
from vhostblk.block.node import BlockNode
from vhostblk.block.tracking import RequestType


async def prepare_writes(
    node: BlockNode, ranges: Ranges, writer: Writer = Writer.REGULAR
) -> tuple[list[HostExtent], Ranges]:
    """Somebody is about to write to these ranges (not empty) by extents, if he can: see the driver's.

    Raises:
        BlockError: the driver's errno; as if one of the writes had failed.
    """
    tracker = node.tracker
    if tracker.serialising:
        ranges = [run for run in ranges if not tracker.serialises(*run)]
    usable = not node.quiesced and node.lane.may_write
    if not usable or not ranges:
        return [], ()
    start, end = min(run[0] for run in ranges), max(run[1] for run in ranges)
    node.in_flight += 1
    request = tracker.begin(RequestType.WRITE, start, end - start)
    try:
        found, before = await node.driver_prepare_writes(ranges, writer)
    finally:
        node.write_log.generation += 1  # a flush has something to do
        tracker.end(request)
        node.leave()
    return _for_above(node, found), before


async def host_extent(node: BlockNode, offset: int, length: int) -> HostExtent | None:
    """The largest run around `offset` that somebody above may use without asking, or None for now.

    The answer holds until it is revoked, which may happen at the caller's next suspension.

    Args:
        length: how much of it somebody wants; none of that may be in a serialising request's way.
    """
    if not node.mappable(offset, length):
        return None
    extent = await node.host_extent(offset, length)
    # Asking the driver may have taken time: look again.
    if extent is None or not extent.offset <= offset < extent.end or node.quiesced:
        return None
    end = min(offset + length, extent.end)
    run = node.tracker.clear_run(offset, end, extent.offset, extent.end)
    if run is None:
        return None
    if extent.flags & ExtentFlag.WRITE and not node.lane.may_write:
        extent = extent.without(ExtentFlag.WRITE)
    if extent.flags & ExtentFlag.WRITE and (node.write_log.dirty_maps or extent.record):
        extent = recorded(node, extent)
    return extent.cut(*run)


async def host_extents(node: BlockNode, ranges: Ranges) -> list[HostExtent]:
    """What somebody above may use of these ranges without asking, as far as the driver can tell of many at once.

    The answer holds as that of `host_extent`.

    Args:
        ranges: in order and apart from each other.
    """
    if node.quiesced or node.inactive:
        return []
    # Asking the driver may have taken time.
    return _for_above(node, await node.host_extents(ranges))


def _for_above(node: BlockNode, found: list[HostExtent]) -> list[HostExtent]:
    """What somebody above may use of what a driver has found."""
    if node.quiesced or node.inactive:
        return []
    if node.tracker.serialising:
        found = [extent for extent in found if node.mappable(extent.offset, extent.length)]
    if not node.lane.may_write:
        return [extent.without(ExtentFlag.WRITE) for extent in found]
    if node.write_log.dirty_maps or any(extent.record for extent in found):
        return [
            recorded(node, extent) if extent.flags & ExtentFlag.WRITE else extent
            for extent in found
        ]
    return found
