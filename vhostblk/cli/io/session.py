"""What the commands of one run share: the open image, what runs in the background, where text goes.

Knows nothing about single commands.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers.file import FileNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.modes import CACHE_MODES, CacheMode
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.block.roles import primary_child
from vhostblk.cli import objects
from vhostblk.cli.io.command import RefusedError
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.filters.blkdebug import BlkdebugNode
    from vhostblk.cli.objects import Object, Objects


@dataclass(frozen=True)
class Modes:
    """How an image is opened, as far as its own options do not say otherwise.

    Attributes: discard: "unmap" or "ignore". aio: "threads", "io_uring", "native" (QEMU's, which needs O_DIRECT; here
        the fastest), None: the fastest. copy_on_read: what is read is written to the top layer. snapshot: what is
        written goes to a temporary overlay.
    """

    read_only: bool = False
    cache: CacheMode = CACHE_MODES["writethrough"]
    discard: str = "unmap"
    aio: str | None = None
    force_share: bool = False
    copy_on_read: bool = False
    snapshot: bool = False

    @property
    def options(self) -> dict[str, Any]:
        """Those of the node, as far as the image's own do not say otherwise."""
        return {
            "read-only": self.read_only,
            **self.cache.options,
            "discard": self.discard,
            **({"snapshot": True} if self.snapshot else {}),
        }

    def added_to(self, given: Mapping[str, str]) -> dict[str, Any]:
        """The image's own options, with what they may not contradict.

        Raises:
            RefusedError: they do.
        """
        if not self.force_share:
            return dict(given)
        if given.get("force-share", "on") != "on":
            raise RefusedError("-U conflicts with image options")
        return {**given, "force-share": True}


@dataclass
class Image:
    """An open image.

    Attributes:
        node: its top layer.
        backend: where requests go; there may be a copy-on-read filter between the two.
        cache: its mode now.
        resizes: we may change its length.
        tags: of all breakpoints that were set.
    """

    graph: BlockGraph
    node: BlockNode
    backend: BlockBackend
    cache: CacheMode
    resizes: bool = False
    tags: list[str] = field(default_factory=list)

    def debugger(self) -> BlkdebugNode | None:
        """The node below which has breakpoints."""
        node: BlockNode | None = self.node
        while node is not None and node.driver_name != "blkdebug":
            edge = primary_child(node)
            node = edge.node if edge is not None else None
        return cast("BlkdebugNode | None", node)

    async def close(self, tasks: set[asyncio.Task[None]]) -> None:
        """Let go what is suspended, wait for what runs, flush, close."""
        debugger = self.debugger()
        for tag in self.tags:
            with suppress(BlockError):
                assert debugger is not None
                debugger.remove_breakpoint(tag)
        await finish(tasks)
        await self.backend.close()
        await self.graph.close_all()


async def finish(tasks: set[asyncio.Task[None]]) -> None:
    """Wait until nothing runs in the background."""
    while tasks:
        await asyncio.wait(tasks)


class Session:
    """One run.

    Args:
        program: its name, for messages.
        wanted: throttle groups and secrets that images may use.
        misalign: buffers are not aligned.

    Attributes:
        image: None: none is open.
        tasks: requests in the background that wait for something.
        ended: what is to be said of those that did not have to wait.
        done: no more commands.

    Raises:
        ConfigError: two objects have the same name, or one cannot be made.

    Context: the control loop.
    Owns: the image.
    """

    def __init__(
        self, program: str, wanted: Sequence[tuple[str, Object]], *, misalign: bool = False
    ) -> None:
        self.program = program
        self.misalign = misalign
        self.image: Image | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.ended: list[Callable[[], None]] = []
        self.done = False
        self._objects: Objects | None = None
        if wanted:
            self._objects = objects.Objects()
            objects.add_objects(self._objects, wanted)

    def tell_ended(self) -> None:
        """Say what came of requests in the background that ended at once: the last one first, as qemu-io does."""
        while self.ended:
            self.ended.pop()()

    def out(self, text: str) -> None:
        """Print a line."""
        sys.stdout.write(f"{text}\n")

    def complain(self, text: str, *, named: bool = False) -> None:
        """Print a line to standard error.

        Args:
            named: with the program's name.
        """
        sys.stderr.write(f"{self.program}: {text}\n" if named else f"{text}\n")

    @property
    def opened(self) -> Image:
        """The image, for commands that have `needs_image`."""
        assert self.image is not None
        return self.image

    async def open(self, filename: str | None, given: Mapping[str, str], modes: Modes) -> None:
        """Open an image.

        Args:
            filename: None: the options say which.
            given: options, with dotted keys.

        Raises:
            RefusedError: there is one already, or it cannot be opened.
        """
        if self.image is not None:
            raise RefusedError("file open already, try 'help close'")
        options = modes.added_to(given)
        graph = BlockGraph(aio=None if modes.aio == "native" else modes.aio)
        if self._objects is not None:
            graph.throttle_groups, graph.secrets = (
                self._objects.throttle_groups,
                self._objects.secrets,
            )
        try:
            if modes.force_share and not modes.read_only:
                raise ConfigError("force-share=on can only be used with read-only images")
            node = await graph.open_image(filename, options, defaults=modes.options)
            if modes.aio == "native":
                check_direct((node.backing if modes.snapshot else None) or node)
            if node.read_only and not modes.read_only:
                raise ConfigError("Block node is read-only")
            top = await _copy_on_read(graph, node) if modes.copy_on_read else node
            backend = BlockBackend(
                top,
                self.program,
                writable=not modes.read_only,
                write_cache=not modes.cache.writethrough,
                shared=Perm.ALL,
            )
        except (ConfigError, BlockError) as error:
            await graph.close_all()
            what = "" if filename is None else f" device {filename}"
            text = error.strerror if isinstance(error, BlockError) else error.qemu_text
            raise RefusedError(f"can't open{what}: {text}") from None
        self.image = Image(graph, node, backend, modes.cache)

    async def close(self) -> None:
        """Close the image, if there is one; what runs in the background comes to its end first."""
        self.tell_ended()
        image, self.image = self.image, None
        if image is not None:
            await image.close(self.tasks)

    async def need(self, perm: Perm) -> None:
        """Ask for permissions that a command needs, on top of those there are.

        Raises:
            RefusedError: they are not to be had.
        """
        if not perm:
            return
        image = self.opened
        if image.node.read_only:
            raise RefusedError("Block node is read-only")
        resize = bool(perm & Perm.RESIZE) or image.resizes
        if image.backend.writable and image.resizes == resize:
            return
        try:
            await image.backend.ask(writable=True, resize=resize)
        except ConfigError as error:
            raise RefusedError(error.qemu_text) from None
        image.resizes = resize


def check_direct(node: BlockNode) -> None:
    """What QEMU says of a file for its own asynchronous I/O.

    Raises:
        ConfigError: it is open with the page cache.
    """
    while (edge := primary_child(node)) is not None:
        node = edge.node
    if isinstance(node, FileNode) and not node.common.cache_direct:
        raise ConfigError(
            "aio=native was specified, but it requires cache.direct=on, which was not specified."
        )


async def _copy_on_read(graph: BlockGraph, node: BlockNode) -> BlockNode:
    if node.read_only:
        raise ConfigError("Can't use copy-on-read on read-only device")
    # In QEMU it is the image that copies: whether it discards is for its own options to say.
    return await graph.add({"driver": "copy-on-read", "file": node.node_name, "discard": "unmap"})
