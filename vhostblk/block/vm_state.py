"""A guest's saved state, which some formats keep beside the disk (block layer row B36).

Bytes at offsets of their own, as large as it takes; an internal snapshot remembers how much of them is its. A layer
that has no place for them asks the one below.

Context: the control loop. Knows nothing about what a state consists of.
"""

from __future__ import annotations

from vhostblk.block import pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.block.quiesce import drained


async def load_vm_state(backend: BlockBackend, offset: int, iov: IoVec) -> None:
    """Read some of it; what was never written is 0.

    Raises:
        BlockError: ENOTSUP: nothing here has a place for it; a child's errno.
    """
    node = backend.node
    async with drained(node):
        await node.driver_load_vm_state(offset, iov)


async def save_vm_state(backend: BlockBackend, offset: int, iov: IoVec) -> None:
    """Write some of it, durably if the backend's writes are.

    Raises:
        BlockError: ENOTSUP: nothing here has a place for it; EPERM: not open for writing; a child's errno.
    """
    backend.check_writable()
    node = backend.node
    async with drained(node):
        await node.driver_save_vm_state(offset, iov)
        if not backend.write_cache:
            await pipeline.flush(node)
