"""What drivers are given to make images with: children to write to, and what to undo (block layer row B35).

Files are made when the driver asks for them, which is after it has looked at its options; a file that was not there
before is gone again if anything fails. Who overwrites a file needs the locks first.

Knows nothing about formats.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from vhostblk.block import opening
from vhostblk.block.backend import BlockBackend
from vhostblk.block.foreign_formats import QEMU_DRIVERS
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.node import BlockNode
from vhostblk.block.options import consume_all
from vhostblk.block.permissions import Perm
from vhostblk.block.registry import DriverRegistry
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.graph import BlockGraph
    from vhostblk.block.host_io import HostIO

Driver = type[BlockNode]


@lean_dataclass(slots=True)
class NewFile:
    """A file that is made when it is needed."""

    protocol: Driver
    own: dict[str, Any]  # the options that open it, flat
    create: dict[str, Any]


class Creation:
    """What a driver may ask for while it makes an image; `async with`.

    Args:
        children: as in the options of a node: names or nodes, or flat options under `key.`; or files to be made.
        locked: the caller is inside `graph.changing()`.

    Context: the control loop.
    Owns: its use of the nodes, until the end.
    """

    def __init__(
        self, graph: BlockGraph, name: str, children: Mapping[str, Any], *, locked: bool = False
    ) -> None:
        self.name = name
        self.drivers: DriverRegistry = graph.drivers
        self.secrets = graph.secrets
        self._graph = graph
        self._children = children
        self._locked = locked
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Creation:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._stack.__aexit__(kind, error, trace)

    def host_io(self) -> HostIO:
        """File I/O, for drivers that make files."""
        return self._graph.host_io(None)

    def on_failure(self, undo: Callable[[], Awaitable[object]]) -> None:
        """Call `undo` if the image does not get ready, after all nodes that were used later are closed."""

        async def leave(
            kind: type[BaseException] | None,
            error: BaseException | None,
            trace: TracebackType | None,
        ) -> None:
            if kind is not None:
                await undo()

        self._stack.push_async_exit(leave)

    def has_child(self, key: str) -> bool:
        """Whether the options name or describe this child."""
        return any(name.partition(".")[0] == key for name in self._children)

    async def child(self, key: str) -> BlockBackend:
        """The use of a child that may be written and resized, and is nobody else's meanwhile.

        Raises:
            ConfigError: there is none; it cannot be made or opened; somebody uses it.
        """
        if not self.has_child(key):
            raise ConfigError(f"Parameter '{key}' is missing: a node name or '{key}.' options")
        new = self._children.get(key)
        if isinstance(new, NewFile):
            options_type = new.protocol.create_options_type()
            assert options_type is not None
            await new.protocol.create(self, consume_all(options_type, {**new.create}))
        node = await self._stack.enter_async_context(self._using(key))
        # Who reads meanwhile sees no image.
        backend = BlockBackend(
            node, f"creation of {self.name}", writable=True, resize=True, shared=Perm.NONE
        )
        self._stack.push_async_callback(backend.close)
        return backend

    async def emptied(self, child: BlockBackend) -> bool:
        """Cut a child to nothing; False: it has the length it has, and its content.

        Raises:
            BlockError: the child's errno.
        """
        try:
            await child.truncate(0)
        except BlockError as error:
            if error.errno != errno.ENOTSUP:
                raise
            return False
        return True

    @asynccontextmanager
    async def _using(self, key: str) -> AsyncIterator[BlockNode]:
        async with self.changing():
            node = await self._open(key)
            self._graph.hold(node)
        try:
            yield node
        finally:
            async with self.changing():
                await self._graph.release(node)

    async def _open(self, key: str) -> BlockNode:
        value = self._children.get(key)
        if isinstance(value, NewFile):
            return await opening.open_node(self._graph, {**value.own})
        if isinstance(value, str):
            return self._graph.find(value)
        if value is not None:
            raise ConfigError(f"Parameter '{key}' expects a node name, not '{value}'")
        prefix = f"{key}."
        inline = {
            name.removeprefix(prefix): value
            for name, value in self._children.items()
            if name.startswith(prefix)
        }
        return await opening.open_node(self._graph, inline, prefix)

    @asynccontextmanager
    async def changing(self) -> AsyncIterator[None]:
        """As `graph.changing`, if the caller is not inside that anyway."""
        if self._locked:
            yield
            return
        async with self._graph.changing():
            yield


def refuse_unknown(drivers: DriverRegistry, name: str, what: str) -> None:
    """Refuse a format that there is not, or that others have.

    Args:
        what: what a driver would be needed for.

    Raises:
        ConfigError: ENOENT, ENOTSUP.
    """
    if name in drivers:
        return
    if name in QEMU_DRIVERS:
        raise ConfigError(f"Format driver '{name}' does not support {what}", errno.ENOTSUP)
    raise ConfigError(f"Unknown file format '{name}'", errno.ENOENT)


def create_options(driver: Driver, what: str) -> type[Any]:
    """The options of new images of a driver.

    Args:
        what: how the message calls the driver.

    Raises:
        ConfigError: ENOTSUP: there are no new images of it.
    """
    options_type = driver.create_options_type()
    if options_type is None:
        raise ConfigError(
            f"{what} '{driver.driver_name}' does not support image creation", errno.ENOTSUP
        )
    return options_type
