"""What a subcommand works with: the graph that has its images, messages, objects, and the name of what is half done.

Knows nothing about single subcommands.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from vhostblk.block.backend import BlockBackend
from vhostblk.block.flags import OpenFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.keyval import parse_flat
from vhostblk.block.modes import CACHE_MODES, CacheMode
from vhostblk.block.opening import NO_FLAGS
from vhostblk.block.permissions import Perm
from vhostblk.cli import objects
from vhostblk.cli.img.arguments import ImgError
from vhostblk.errors import BlockError, ConfigError, VhostBlkError

if TYPE_CHECKING:
    from vhostblk.cli.objects import Object


class Session:
    """One run of a subcommand; `async with`.

    Args:
        program: its name, for messages.

    Attributes:
        quiet: `print` is silent.
        unfinished: names of images that are being written, and of no use before that is done.

    Context: the control loop.
    Owns: the graph and what is opened in it.
    """

    def __init__(self, program: str) -> None:
        self.program = program
        self.graph = BlockGraph(may_block=True)
        self.quiet = False
        self.unfinished: list[str] = []
        self._backends: list[BlockBackend] = []

    async def __aenter__(self) -> Session:
        return self

    async def __aexit__(self, *exc: object) -> None:
        """Close what is open; a flush that fails is logged, whoever cares has flushed before."""
        while self._backends:
            await self._backends.pop().close()
        await self.graph.close_all()

    # ------------------------------------------------------------------ messages

    def print(self, text: str) -> None:
        """Print a line, unless `-q` was given."""
        if not self.quiet:
            self.out(text)

    def out(self, text: str) -> None:
        """Print a line in any case."""
        sys.stdout.write(f"{text}\n")

    def complain(self, text: str) -> None:
        """Print a line to standard error, with the program's name."""
        # As in QEMU, what was printed to a file or a pipe before comes later.
        sys.stderr.write(f"{self.program}: {text}\n")

    def name_unfinished(self) -> None:
        """Say which images are of no use, because this has ended too early."""
        for name in self.unfinished:
            self.complain(f"interrupted: '{name}' is not complete")

    def warn(self, text: str) -> None:
        """The same, for what does not stop us."""
        self.complain(f"warning: {text}")

    # ------------------------------------------------------------------ objects

    def add_objects(self, wanted: Sequence[tuple[str, Object]]) -> None:
        """Make what `--object` describes.

        Raises:
            ConfigError: two have the same name, or one cannot be made.
        """
        if wanted:
            objects.add_objects(self.graph, wanted)

    # ------------------------------------------------------------------ images

    async def open(
        self,
        name: str,
        driver: str | None = None,
        *,
        image_opts: bool = False,
        writable: bool = False,
        resize: bool = False,
        cache: CacheMode = CACHE_MODES["writeback"],
        force_share: bool = False,
        more: Mapping[str, Any] | None = None,
        flags: OpenFlag = NO_FLAGS,
        shared: Perm = Perm.ALL,
    ) -> BlockBackend:
        """Open an image; it stays open until `close`, or the end.

        Args:
            name: of a file, or a list of options.
            image_opts: which of the two.
            driver: the image's format; found out if absent.
            more: further options of the node, dotted, unless the user says otherwise.
            flags: CHECK, NO_BACKING: see `BlockGraph.open_image`.
            shared: what other users of the same node may do.

        Raises:
            ImgError: it cannot be opened.
        """
        given: dict[str, Any] = {}
        if image_opts:
            if driver is not None:
                raise ImgError("--image-opts and --format are mutually exclusive")
            try:
                given = dict(parse_flat(name, "file"))
            except ConfigError as error:
                raise ImgError(error.qemu_text) from None
        elif driver is not None:
            given["driver"] = driver
        if force_share:
            if given.get("force-share", "on") != "on":
                raise ImgError("--force-share/-U conflicts with image options")
            given["force-share"] = True
        defaults = {"read-only": not writable, **cache.options, **(more or {})}
        try:
            node = await self.graph.open_image(
                None if image_opts else name, given, defaults=defaults, flags=flags
            )
            if writable and node.read_only:
                raise ConfigError("Block node is read-only")
            backend = BlockBackend(
                node,
                self.program,
                writable=writable,
                resize=resize,
                write_cache=not cache.writethrough,
                shared=shared,
            )
        except (ConfigError, BlockError) as error:
            raise ImgError(f"Could not open '{name}': {reason(error)}") from None
        self._backends.append(backend)
        return backend

    async def close(self, backend: BlockBackend) -> None:
        """Flush an image and close it before the end.

        Raises:
            ImgError: what was written may be lost.
        """
        self._backends.remove(backend)
        if not await backend.close():
            raise ImgError("Failed to flush the image")


def errno_text(error: BlockError) -> str:
    """What the kernel calls this, without what else is known."""
    return os.strerror(error.errno or errno.EIO)


def reason(error: VhostBlkError) -> str:
    """What went wrong, for the end of a line."""
    if isinstance(error, ConfigError):
        return error.qemu_text
    return (error.strerror or str(error)) if isinstance(error, BlockError) else str(error)
