"""Nodes as QMP describes them: `BlockDeviceInfo` (block layer row B41.6).

Knows nothing about sockets. What the image in a node is like: `image_info.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vhostblk.block.dirty_bitmap import DirtyInfo, query_bitmaps
from vhostblk.block.image_info import query_image_info
from vhostblk.block.introspection import filename
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import backing_chain
from vhostblk.block.roles import Role

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph


async def named_nodes(graph: BlockGraph, *, flat: bool = False) -> list[dict[str, Any]]:
    """What `query-named-block-nodes` returns: all nodes, the latest opened first (row B41.6).

    Args:
        flat: without the images that each is backed by.

    Raises:
        BlockError: one of them cannot be looked at.
    """
    nodes = tuple(graph.nodes.values())
    return [await block_device_info(node, flat=flat) for node in reversed(nodes)]


async def block_device_info(node: BlockNode, *, flat: bool = False) -> dict[str, Any]:
    """One node as `BlockDeviceInfo`."""
    backing = node.backing
    answer: dict[str, Any] = {
        "file": filename(node),
        "node-name": node.node_name,
        "ro": node.read_only,
        "drv": node.driver_name,
        "backing_file_depth": sum(bool(edge.role & Role.COW) for edge in backing_chain(node, None)),
        "encrypted": node.is_encrypted,
        "detect_zeroes": node.detect_zeroes or "off",
        # Limits of a node are those of the throttle filters above it.
        **dict.fromkeys(("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"), 0),
        "image": await _image(node, flat=flat),
        "cache": {
            "writeback": True,  # row C3: nodes always are; the write cache is the device's
            "direct": node.common.cache_direct,
            "no-flush": node.no_flush,
        },
        "write_threshold": node.write_threshold,
    }
    if backing is not None:
        answer["backing_file"] = filename(backing)
    if node.bitmaps:
        answer["dirty-bitmaps"] = [_bitmap(info) for info in query_bitmaps(node)]
    return answer


def _bitmap(info: DirtyInfo) -> dict[str, Any]:
    """As `BlockDirtyInfo`."""
    answer: dict[str, Any] = {} if info.name is None else {"name": info.name}
    answer |= {
        "count": info.count,
        "granularity": info.granularity,
        "recording": info.recording,
        "busy": info.busy,
        "persistent": info.persistent,
    }
    if info.inconsistent:
        answer["inconsistent"] = True
    return answer


async def _image(node: BlockNode, *, flat: bool) -> dict[str, Any]:
    """As `ImageInfo`, with those below."""
    answer = (await query_image_info(node)).to_qmp()
    backing = node.backing
    if backing is not None and not flat:
        answer["backing-image"] = await _image(backing, flat=False)
    return answer
