"""An export's disk is exchanged for another while its guest is connected (block layer row B38).

Theory of operation: the root edge moves from one node to the other inside a drain, which waits for the requests that
have begun, takes back all extents and holds those that come. So each request sees one disk, the old one or the new one;
those that had failed and were waiting to be tried again were meant for the old one, and are reported. The guest is told
through its configuration space. A disk that is ejected leaves one of length 0 behind.

What the driver negotiated stays: a new disk must be as writable as the export, and its blocks not larger than the guest
was told.

Knows nothing about sessions, nor how commands arrive.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable

from vhostblk.block import pipeline, surgery
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.no_medium import NoMediumNode
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, check_op
from vhostblk.errors import BlockError, ConfigError
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.events import ExportEvent, MediumInserted, MediumRemoved


class Medium:
    """The disk in an export.

    Args:
        export: its id.
        device: whose backend's root moves.
        in_use: whether queues are running: then it is locked.
        changed: called when there is another one.
        emit: hears what has happened.

    Context: the control loop; one change at a time.
    """

    def __init__(
        self,
        export: str,
        device: BlkDevice,
        *,
        in_use: Callable[[], bool],
        changed: Callable[[], None],
        emit: Callable[[ExportEvent], None],
    ) -> None:
        self._export = export
        self._device = device
        self._in_use = in_use
        self._changed = changed
        self._emit = emit
        self._log = logging.getLogger(__name__)

    @property
    def is_inserted(self) -> bool:
        """Whether there is a disk."""
        return not isinstance(self._backend.node, NoMediumNode)

    @property
    def _backend(self) -> BlockBackend:
        return self._device.backend

    async def remove(self, graph: BlockGraph, *, force: bool = False) -> None:
        """Take the disk out; its capacity is 0 from then on, and requests fail. Does nothing if there is none.

        Args:
            force: also while the guest uses it.

        Raises:
            ConfigError: the guest or a job uses it, or what it has written cannot be made durable.
        """
        if self.is_inserted:
            check_op(self._backend.node, OpType.EJECT)
            await self._exchange(graph, NoMediumNode(), force=force)

    async def insert(self, graph: BlockGraph, node: BlockNode) -> None:
        """Put a disk in.

        Raises:
            ConfigError: there is one, or the new one does not suit; nothing has changed.
        """
        if self.is_inserted:
            raise ConfigError(f"Device '{self._export}' has a medium already", errno.EBUSY)
        await self._exchange(graph, node, force=True)

    async def change(self, graph: BlockGraph, node: BlockNode, *, force: bool = False) -> None:
        """Put another disk in the place of the one there is, if any; nobody sees the time between.

        Raises:
            ConfigError: as `remove` and `insert`; nothing has changed.
        """
        check_op(self._backend.node, OpType.CHANGE)
        await self._exchange(graph, node, force=force)

    async def _exchange(self, graph: BlockGraph, new: BlockNode, *, force: bool) -> None:
        if self.is_inserted and self._in_use() and not force:
            raise ConfigError(
                f"Device '{self._export}' is locked and force was not specified", errno.EBUSY
            )
        if new.block_sizes.logical > self._device.logical_block_size:
            raise ConfigError(
                f"Node '{new.node_name}' has blocks of {new.block_sizes.logical} bytes, the guest of "
                f"'{self._export}' was told {self._device.logical_block_size}"
            )
        old, was_inserted = self._backend.node, self.is_inserted
        graph.hold(old)
        try:
            try:
                await pipeline.flush(old)
            except BlockError as error:
                if was_inserted and not force:
                    raise ConfigError(
                        f"Error flushing node '{old.node_name}': {error.strerror}",
                        error.errno or errno.EIO,
                    ) from None
            with self._device.parking.closed():
                await surgery.replace_child(graph, self._backend.root, new)
                self._device.medium += 1
            self._changed()
            if was_inserted:
                self._emit(MediumRemoved(self._export, old.node_name))
            if self.is_inserted:
                self._emit(MediumInserted(self._export, new.node_name))
            # The guest's next flush is for the new one: this is the last of the old one.
            if was_inserted:
                await self._flush(old)
        finally:
            await graph.release(old)

    async def _flush(self, old: BlockNode) -> None:
        try:
            await pipeline.flush(old)
        except BlockError as error:
            self._log.error("export %s: flush of its former disk failed: %s", self._export, error)
