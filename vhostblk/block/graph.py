"""The graph: all nodes of a daemon, how they come, are found, and go (block layer rows B05 and B07).

A node lives as long as somebody needs it: its parents, whoever holds it (`hold`), and for nodes from `add()` the user,
until `remove()`. Changes of the graph are made one at a time (`changing`), on the control loop.

How a node is opened is in `opening.py`, how the graph is rebuilt in `surgery.py` and `reopen.py`. Knows nothing about
requests.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

from vhostblk.block import opening, pipeline, temporary_overlay
from vhostblk.block.bounce import BouncePool
from vhostblk.block.crypto.secret import Secrets
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.edge import Edge
from vhostblk.block.execution import ControlLoop, to_the_end
from vhostblk.block.filename import is_json, parse_json
from vhostblk.block.flags import OpenFlag
from vhostblk.block.host_io import HostIO, create_host_io
from vhostblk.block.host_needs import HostNeeds, all_needs
from vhostblk.block.keyval import flatten, parse_options
from vhostblk.block.names import Names
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, check_frozen, check_op
from vhostblk.block.quiesce import drained
from vhostblk.block.registry import DriverRegistry
from vhostblk.errors import BlockError, ConfigError, StateError

if TYPE_CHECKING:
    from vhostblk.block.throttle_group import ThrottleGroup

__all__ = ["BlockGraph", "Edge"]

log = logging.getLogger(__name__)


class BlockGraph:
    """All nodes of one daemon.

    Args:
        drivers: name to node class.
        aio: how files do their I/O if their options do not say ("io_uring", "threads"); None: the fastest that works.
        may_block: the loop has nothing else to do: small calls that seldom wait are made at once, without threads.

    Attributes:
        nodes: by name, in the order in which they were opened.
        looks_only: readers let other processes write, as they let others here: they want to know what an image is
            like, and nothing else.
        secrets: what opens encrypted images.
        serves_guests: what is opened is for guests, and not for an image tool.
        quiesced: drains of everything (`quiesce.all_drained`): new nodes begin with so many.

    Context: the control loop; nothing here may be called before it runs.
    Owns: the nodes, the file I/O they use, their scratch buffers.
    """

    def __init__(
        self,
        drivers: Mapping[str, type[BlockNode]] = DRIVERS,
        *,
        aio: str | None = None,
        may_block: bool = False,
    ) -> None:
        self.drivers = drivers if isinstance(drivers, DriverRegistry) else DriverRegistry(drivers)
        self.names = Names()
        self.nodes = self.names.nodes
        self.control = ControlLoop()
        self.bounce = BouncePool()
        self.looks_only = self.serves_guests = False
        self.secrets = Secrets()
        self.quiesced = 0
        self._opening: set[BlockNode] = set()  # not ready to be anybody's child
        self._added: set[BlockNode] = set()  # from add(): the user's
        self._change = asyncio.Lock()
        self.aio = aio
        self._may_block = may_block
        self._host_io: dict[str | None, HostIO] = {}
        self.throttle_groups: dict[str, ThrottleGroup] = {}
        self._flush_failed = False  # of a node at its end

    # ------------------------------------------------------------------ for users

    async def add(self, options: Mapping[str, Any] | str) -> BlockNode:
        """Open a node.

        Args:
            options: nested or dotted; or the text of a `--blockdev` option. With `snapshot`, what is written goes to a
                temporary overlay.

        Raises: ConfigError: one line that names the option, the value and what is allowed, or the
            file and the reason.
        """
        if isinstance(options, str):
            options = parse_options(options, "driver")
        flat = flatten(options)
        async with self.changing():
            return self.adopt(
                await temporary_overlay.open_top(
                    self, flat, lambda flat: opening.open_node(self, flat)
                )
            )

    async def open_image(
        self,
        filename: str | None,
        options: Mapping[str, Any] | None = None,
        *,
        defaults: Mapping[str, Any] | None = None,
        flags: OpenFlag = opening.NO_FLAGS,
    ) -> BlockNode:
        """Open what a name stands for: a path, `protocol:rest` or `json:{...}`.

        Args:
            filename: None: the options say which file.
            options: as for `add`; without `driver` the format is guessed from the content, and inline children need
                none: their file name says it.
            defaults: what holds unless the options, or those in the name, say otherwise.
            flags: CHECK: open it only for `check.check`: a damaged image will do; NO_BACKING: without the backing file
                that the image names; NO_IO: open it, read-only, only for `image_info.query_image_info`: without its
                data file.

        Raises:
            ConfigError: as `add`.
        """
        flat = flatten(options or {})
        if filename is not None and is_json(filename):
            # Now: some of them are not for the image, but for what may be put above it.
            flat, filename = {**parse_json(filename), **flat}, None
        flat = {**flatten(defaults or {}), **flat}
        async with self.changing():
            return self.adopt(
                await temporary_overlay.open_top(
                    *(self, flat),
                    lambda flat: opening.open_image(self, filename, flat, flags=flags),
                )
            )

    def find(self, name: str) -> BlockNode:
        """The node of this name.

        Raises:
            ConfigError: ENODEV; there is none.
        """
        if name not in self.nodes or self.nodes[name] in self._opening:
            raise ConfigError(
                f"Cannot find node '{name}'",
                errno.ENODEV,
                qemu_text=f"Cannot find device='{name}' nor node-name='{name}'",
            )
        return self.nodes[name]

    async def remove(self, name: str) -> None:
        """Close a node that nobody uses; inline children that nobody else uses go with it.

        Raises:
            ConfigError: there is no such node, or it is in use; names the user.
        """
        async with self.changing():
            node = self.find(name)
            if node.parents:
                user = node.parents[0].describe()
                raise ConfigError(f"Node '{name}' is in use: {user}", errno.EBUSY)
            check_op(node, OpType.DRIVE_DEL)
            if node.references > (node in self._added):
                raise ConfigError(f"Node '{name}' is in use", errno.EBUSY)
            for edge in node.children.values():
                check_frozen(edge)
            await self.give_up(node)

    async def close_all(self) -> bool:
        """Close every node, parents first, and all file I/O.

        Returns:
            False if a node's last flush failed, now or when it was removed; that is in the log.

        Raises:
            StateError: somebody outside the graph still uses a node; the others are closed.
        """
        async with self.changing():
            while roots := [node for node in self.nodes.values() if not node.parents]:
                for node in roots:
                    if node.node_name in self.nodes:
                        await self._close(node)
            if self.nodes:
                left = next(node for node in self.nodes.values() if node.parents)
                raise StateError(f"Node '{left.node_name}' is in use: {left.parents[0].describe()}")
            for host_io in self._host_io.values():
                await host_io.close()
            self._host_io.clear()
            self.bounce.close()
            return not self._flush_failed

    # ------------------------------------------------------------------ for whoever rebuilds it

    @asynccontextmanager
    async def changing(self, *nodes: BlockNode) -> AsyncIterator[None]:
        """Nobody else changes the graph inside `async with`, and nothing is in flight in these nodes and above.

        Must not be awaited by a request, nor inside itself.

        Raises:
            StateError: this is not the control loop.
        """
        self.control.check()
        async with self._change, AsyncExitStack() as stack:
            for node in nodes:
                await stack.enter_async_context(drained(node))
            yield

    def hold(self, node: BlockNode) -> None:
        """Keep a node alive until `release`."""
        node.references += 1

    async def release(self, node: BlockNode) -> None:
        """Undo one `hold`; a node that nobody needs any more is closed."""
        assert node.references > 0
        node.references -= 1
        await self.collect(node)

    async def collect(self, node: BlockNode) -> None:
        """Close a node if nobody needs it any more (row B07.7), also if whoever waits is cancelled."""
        if not node.parents and not node.references and self.nodes.get(node.node_name) is node:
            await to_the_end(self._close(node))

    def adopt(self, node: BlockNode) -> BlockNode:
        """The node stays until the user removes it."""
        self._added.add(node)
        self.hold(node)
        return node

    async def give_up(self, node: BlockNode) -> None:
        """Nobody has asked for the node to stay; close it if nobody needs it."""
        self._disown(node)
        await self.collect(node)

    def is_owned(self, node: BlockNode) -> bool:
        """Whether it is the user who has to remove it (row B07.4)."""
        return node in self._added

    def host_io(self, aio: str | None) -> HostIO:
        """The file I/O of this kind, shared by all nodes.

        Raises:
            ConfigError: it is not available here.
        """
        aio = aio or self.aio
        if aio not in self._host_io:
            self._host_io[aio] = create_host_io(aio)
            self._host_io[aio].may_block = self._may_block
        return self._host_io[aio]

    async def end_threads(self) -> None:
        """End all threads and rings of file I/O; there are new ones when they are needed. Nothing is in flight."""
        for host_io in self._host_io.values():
            await host_io.start_anew()

    def host_needs(self) -> HostNeeds:
        """What all nodes need of the host from now on."""
        return all_needs(node.host_needs() for node in self.nodes.values())

    def throttle_group(self, name: str) -> ThrottleGroup:
        """The throttle group of this id.

        Raises:
            ConfigError: there is none.
        """
        if name not in self.throttle_groups:
            raise ConfigError(f"Throttle group '{name}' does not exist")
        return self.throttle_groups[name]

    def enter(self, node: BlockNode) -> None:
        """A node that is about to open has its name now, but is nobody's child yet."""
        self.nodes[node.node_name] = node
        node.left_alone = self._left_alone
        self._opening.add(node)

    def ready(self, node: BlockNode) -> None:
        """The node is open; children come before their parents."""
        self._opening.discard(node)
        self.nodes[node.node_name] = self.nodes.pop(node.node_name)

    async def dissolve(self, node: BlockNode) -> None:
        """Close a node without a flush, and those of its children that nobody else needs."""
        try:
            await node.close()
        except OSError as error:
            log.error(
                "node '%s': close failed: %s",
                *(node.node_name, error),
                extra={"qemu_reports": node.close_complaints(error)},
            )
        finally:  # whoever was cancelled cannot go back either
            edges = tuple(node.children.values())
            for edge in edges:
                edge.frozen = False  # whoever froze it had the node's use in mind
                edge.detach()
            self.nodes.pop(node.node_name, None)
            self._opening.discard(node)
            self._disown(node)
            for edge in edges:
                await self.collect(edge.node)

    # ------------------------------------------------------------------

    async def _left_alone(self, node: BlockNode) -> None:
        if not node.parents and not node.references:
            async with self.changing():
                await self.collect(node)

    def _disown(self, node: BlockNode) -> None:
        if node in self._added:
            self._added.discard(node)
            node.references -= 1

    async def _close(self, node: BlockNode) -> None:
        """Row B07.9; also B07.10 with row C19: what the last flush says is logged."""
        async with drained(node):
            try:
                await pipeline.flush(node)
            except BlockError as error:
                log.error(
                    "node '%s': flush at close failed: %s",
                    *(node.node_name, error),
                    extra={"qemu_says": None},
                )
                self._flush_failed = True
        await self.dissolve(node)
