"""How long a node is, how long it could be, and what it takes on the disk (block layer row B31).

The length of an open node is `node.length`, its block sizes `node.block_sizes`; requests that change the length are in
`pipeline.truncate`. There is no geometry of cylinders and heads: no driver has one (row B31.8).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vhostblk.block.edge import Edge
from vhostblk.block.flags import Preallocation
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.limits import SECTOR_SIZE, align_up
from vhostblk.block.op_blockers import OpType, check_op
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import Role

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph
    from vhostblk.block.node import BlockNode, EdgeParent


@lean_dataclass(frozen=True, slots=True)
class Measurement:
    """What an image takes on the disk, in bytes.

    Attributes: required: with what the source has allocated. fully_allocated: with every block written. bitmaps: what
        those of the source take besides; None: they cannot be kept.
    """

    required: int
    fully_allocated: int
    bitmaps: int | None = None


async def resize(
    graph: BlockGraph,
    user: EdgeParent,
    node: BlockNode,
    length: int,
    preallocation: Preallocation = Preallocation.OFF,
) -> None:
    """Change the length of a node for a user who is not one of its parents (the `block_resize` command).

    Nothing is in flight in the node, nor above, meanwhile: a request that has begun before there was less room would
    end behind the end.

    Raises:
        ConfigError: EBUSY: a job blocks it; or a parent does not share the resize permission.
        BlockError: as `pipeline.truncate`.
    """
    check_op(node, OpType.RESIZE)
    async with graph.changing(node):
        edge = Edge(user, node, "resize", Role.DATA, Perm.RESIZE, Perm.ALL)
        edge.announces = (
            False  # the user comes and goes with memory meanwhile, and says so on its own way only
        )
        edge.attach()
        try:
            await edge.truncate(align_up(length, SECTOR_SIZE), preallocation)
        finally:
            edge.detach()


async def has_become(node: BlockNode, length: int) -> None:
    """A driver has found that its node has another length, whoever made it so.

    First its users are told, so that nobody is shown more than there is for longer than that takes. Then what they knew
    of the part that has come or gone is taken back; what is in flight there has ended when this returns.
    """
    low, high = sorted((node.length, length))
    if low < high:
        node.set_length(length)
        await node.revoke(low, high - low)


async def allocated_size(node: BlockNode) -> int:
    """Bytes that the node's own files take on the disk; without its backing file (row B31.5).

    Raises:
        BlockError: ENOTSUP if somebody below does not know.
    """
    return await node.driver_allocated_size()


def measure_raw(length: int) -> Measurement:
    """What a raw image of this length takes (row B31.6)."""
    size = align_up(length, SECTOR_SIZE)
    return Measurement(size, size)
