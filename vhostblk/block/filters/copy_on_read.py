"""`copy-on-read`: what was read from a backing node once is in the layer above it from then on (row B20).

With `bottom`, only what that node and those above it have is copied; what comes from below is read, and stays there.
"""

from __future__ import annotations

from dataclasses import dataclass

from vhostblk.block.driver import OpenContext
from vhostblk.block.edge import Edge
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.op_blockers import backing_chain, check_frozen
from vhostblk.block.options import STRING, option
from vhostblk.block.permissions import Perm
from vhostblk.block.reopen import Reopen
from vhostblk.block.roles import chain_child
from vhostblk.block.status import is_allocated, is_allocated_above
from vhostblk.errors import BlockError, ConfigError

_COPY_ON_READ = int(Req.COPY_ON_READ)


@dataclass(frozen=True, slots=True)
class CopyOnReadOptions:
    """QEMU's options for copy-on-read, besides `file`."""

    bottom: str | None = option(
        STRING, None, about="the lowest node whose data is copied; absent: of all the chain"
    )


class CopyOnReadNode(FilterNode):
    """Reads with COPY_ON_READ; the pipeline of the child does the copying. Writes need nothing."""

    driver_name = "copy-on-read"
    options_type = CopyOnReadOptions
    options: CopyOnReadOptions
    _bottom: BlockNode | None = None
    _frozen: tuple[Edge, ...] = ()

    async def open(self, context: OpenContext) -> None:
        """Open the child, and keep the chain down to `bottom` as it is.

        Raises:
            ConfigError: `bottom` is no layer of the chain, or somebody else has frozen part of it.
        """
        await super().open(context)
        if self.options.bottom is None:
            return
        bottom = context.find_node(self.options.bottom)
        if bottom.is_filter:
            raise ConfigError(f"Parameter 'bottom': node '{bottom.node_name}' is a filter")
        edges = backing_chain(self.file.node, bottom)
        for edge in edges:
            check_frozen(edge)
        for edge in edges:
            edge.frozen = True
        self._bottom, self._frozen = bottom, tuple(edges)

    async def close(self) -> None:
        """The chain may change again."""
        for edge in self._frozen:
            edge.frozen = False
        self._frozen = ()

    async def reopen_prepare(self, reopen: Reopen) -> None:
        """Refuse another child: `bottom` is below this one.

        Raises:
            ConfigError: so it is.
        """
        if (
            self._bottom is not None
            and reopen.children.get("file", self.file.node) is not self.file.node
        ):
            raise ConfigError("Cannot change the option 'file' of a filter with 'bottom'")

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Read, and copy."""
        if self._bottom is None:
            await self.file.preadv(offset, iov, _COPY_ON_READ)
            return
        done = 0
        while done < length:
            flags, count = await self._how(self._bottom, offset + done, length - done)
            await self.file.preadv(offset + done, iov.slice(done, count), flags)
            done += count

    async def _how(self, bottom: BlockNode, offset: int, length: int) -> tuple[int, int]:
        """Request flags, and for how many bytes."""
        layer = self.file.node
        allocated, count = await is_allocated(layer, offset, length)
        while layer.is_filter and (edge := chain_child(layer)) is not None:
            layer = edge.node
        below = layer.backing
        # A chain that has been replaced has no bottom, and nothing to copy.
        if allocated or below is None or bottom not in _layers(below):
            return 0, count or length
        edge = chain_child(bottom)
        try:
            base = edge.node if edge is not None else None
            allocated, run = await is_allocated_above(below, base, offset, count)
        except BlockError:
            return _COPY_ON_READ, count  # the read will tell
        return (_COPY_ON_READ if allocated else 0), run or count

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        """What is visible does not change (row C9); a read-only child does not even allow that (row B20.1)."""
        if self.inactive:  # nothing is copied
            return super().child_perm(edge, perm, shared)
        return perm | Perm.WRITE_UNCHANGED, shared | Perm.WRITE_UNCHANGED


def _layers(node: BlockNode) -> list[BlockNode]:
    """A node and the chain below it."""
    return [node, *(edge.node for edge in backing_chain(node, None))]
