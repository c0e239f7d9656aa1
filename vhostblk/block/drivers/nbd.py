"""`nbd`: a disk that another process serves, perhaps elsewhere (block layer rows B03 and B04; NBD's doc/proto.md).

The server's size may be any; the disk has whole sectors. What is behind the server's end reads as zeroes, and takes
nothing but zeroes. What a write, a flush or a status costs is the server's business: there are no extents, so every
request comes here.

Options and names are in `nbd_address.py`; connections, requests that wait and servers that come back in `nbd_link.py`.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vhostblk.block.drivers.nbd_address import TEXT, NbdOptions, parse_filename
from vhostblk.block.drivers.nbd_link import Link
from vhostblk.block.drivers.nbd_wire import Command, CommandFlag, ExportFlag, Request
from vhostblk.block.flags import Preallocation, StatusFlag
from vhostblk.block.host_needs import HostNeeds
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import SECTOR_SIZE, align_down, align_up
from vhostblk.block.node import BlockNode, OpenContext, Req
from vhostblk.block.options import SIZE, option
from vhostblk.block.status import BlockStatus
from vhostblk.errors import BlockError, ConfigError

if TYPE_CHECKING:
    from vhostblk.block.creation import Creation
    from vhostblk.block.registry import DriverRegistry
    from vhostblk.block.reopen import Reopen

MAX_TRANSFER = 32 << 20  # what servers take that do not say what they take
_INT_MAX = 0x7FFF_FFFF
_MAX_PREFERRED = 1 << 30
_ALL = "base:allocation"
_DEPTH = "qemu:allocation-depth"
_HOLE, _ZERO = 1, 2  # NBD_STATE_*


@dataclass(frozen=True, slots=True)
class NbdCreateOptions:
    """What can be asked of a server that is there, and what a file name says of it."""

    server_type: str = option(TEXT, name="server.type", about="inet or unix", listed=False)
    server_path: str | None = option(TEXT, None, name="server.path", about="path", listed=False)
    server_host: str | None = option(TEXT, None, name="server.host", about="host", listed=False)
    server_port: str | None = option(TEXT, None, name="server.port", about="port", listed=False)
    export: str | None = option(TEXT, None, about="name of the export", listed=False)
    size: int = option(SIZE, 0, about="Virtual disk size", tacit=True)

    def server(self) -> NbdOptions:
        """The options of a node there."""
        return NbdOptions(
            server_type=self.server_type,
            server_path=self.server_path,
            server_host=self.server_host,
            server_port=self.server_port,
            export=self.export,
        )


class NbdNode(BlockNode):
    """An export of an NBD server.

    Owns: the link to it.
    """

    driver_name = "nbd"
    protocol_name = "nbd"
    more_protocol_names = ("nbd+tcp", "nbd+unix")
    has_directory = False  # nobody says how names of exports belong together
    options_type = NbdOptions
    options: NbdOptions
    is_protocol = True
    _link: Link | None = None

    @classmethod
    def create_options_type(cls) -> type[Any] | None:
        """Of an export that is there."""
        return NbdCreateOptions

    @classmethod
    def parse_filename(cls, filename: str, drivers: DriverRegistry) -> dict[str, Any]:
        """See `nbd_address.parse_filename`."""
        return parse_filename(filename)

    def exact_filename(self) -> str:
        """An URL."""
        return self.options.address().filename(self.options.export)

    # ------------------------------------------------------------------ life

    @classmethod
    async def create(cls, creation: Creation, options: NbdCreateOptions) -> None:
        """The export has to be there; its first sector does not look like an image any more.

        Raises:
            ConfigError: there is no such export, it is read-only, or too small.
            BlockError: the server's errno.
        """
        link = _link(options.server(), "new image")
        try:
            await link.open(0)
            export = link.export
            if export.flags & ExportFlag.READ_ONLY:
                raise ConfigError("NBD export is read-only", errno.EACCES)
            if export.size < options.size:
                raise ConfigError("Cannot grow NBD nodes")
            length = min(export.size, max(SECTOR_SIZE, export.min_block))
            if length:
                zeroes = IoVec.of(bytes(length))
                await link.request(lambda: Request(Command.WRITE, 0, length, zeroes))
            if export.flags & ExportFlag.SEND_FLUSH:
                await link.request(lambda: Request(Command.FLUSH))
        finally:
            await link.close()

    def host_needs(self) -> HostNeeds:
        """The server, which may go and come back."""
        return self.options.address().host_needs()

    async def open(self, context: OpenContext) -> None:
        """Connect to the server.

        Raises:
            ConfigError: nobody is there, or has no such export; it is read-only, and the node is not.
        """
        self._link = _link(self.options, self.node_name)
        await self._link.open(self.options.open_timeout)
        export = self._link.export
        wanted = self.options.x_dirty_bitmap
        if wanted is not None and export.context is None:
            raise ConfigError(f"requested x-dirty-bitmap {wanted} not found")
        if export.flags & ExportFlag.READ_ONLY and not self.read_only:
            if not self.common.auto_read_only:
                raise ConfigError("NBD export is read-only", errno.EACCES)
            self.read_only = True
        self.length = align_up(export.size, SECTOR_SIZE)
        write, zero = Req.WRITE_UNCHANGED, Req.WRITE_UNCHANGED
        if export.flags & ExportFlag.SEND_FUA:
            write |= Req.FUA
            zero |= Req.FUA
        if export.flags & ExportFlag.SEND_WRITE_ZEROES:
            zero |= Req.MAY_UNMAP
            if export.flags & ExportFlag.SEND_FAST_ZERO:
                zero |= Req.NO_FALLBACK
        self.supported_write_flags, self.supported_zero_flags = int(write), int(zero)

    async def close(self) -> None:
        """Leave the server."""
        link, self._link = self._link, None
        if link is not None:
            await link.close()

    async def refresh_length(self) -> None:
        """An export has the size that it had when it was opened."""

    def refresh_limits(self) -> None:
        """What the server says; what QEMU takes to be so where it does not."""
        export, limits = self._server.export, self.limits
        align = export.min_block
        if not align:
            # A size that is no number of sectors, or block status: then single bytes are possible.
            odd = export.size % SECTOR_SIZE or export.context is not None
            align = 1 if odd else SECTOR_SIZE
        most = min(export.max_block or MAX_TRANSFER, MAX_TRANSFER)
        limits.request_alignment = align
        limits.max_transfer = limits.max_pwrite_zeroes = most
        limits.max_pdiscard = align_down(_INT_MAX, align)
        limits.opt_transfer = min(export.preferred_block, _MAX_PREFERRED)
        limits.min_mem_alignment = 1

    async def reopen_prepare(self, reopen: Reopen) -> None:
        """An export that is read-only stays so.

        Raises:
            ConfigError: EACCES.
        """
        if not reopen.read_only and self._server.export.flags & ExportFlag.READ_ONLY:
            if not reopen.common.auto_read_only:
                raise ConfigError("Can't reopen read-only NBD mount as read/write", errno.EACCES)
            reopen.read_only = True

    # ------------------------------------------------------------------ requests

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        """Read; zeroes behind the server's end."""
        there = self._there(offset, length)
        if there < length:
            iov.zero(there, length - there)
            iov = iov.slice(0, there)
        if there:
            await self._server.request(lambda: Request(Command.READ, offset, there, iov))

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        """Write; ENOSPC for what would have to be behind the server's end."""
        there = self._there(offset, length)
        if there < length:
            if not iov.slice(there, length - there).is_zero():
                raise BlockError(
                    errno.ENOSPC, f"{self.node_name}: the export ends before {offset + length}"
                )
            iov = iov.slice(0, there)
        if there:
            wire = CommandFlag.FUA if flags & Req.FUA else CommandFlag.NONE
            await self._server.request(lambda: Request(Command.WRITE, offset, there, iov, wire))

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        """The server does, if it can."""
        if not self._server.export.flags & ExportFlag.SEND_WRITE_ZEROES:
            raise BlockError(errno.ENOTSUP)
        wire = CommandFlag.FUA if flags & Req.FUA else CommandFlag.NONE
        if not flags & Req.MAY_UNMAP:
            wire |= CommandFlag.NO_HOLE
        if flags & Req.NO_FALLBACK:
            wire |= CommandFlag.FAST_ZERO
        if there := self._there(offset, length):
            await self._server.request(
                lambda: Request(Command.WRITE_ZEROES, offset, there, flags=wire)
            )

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        """The server does, if it can; there are no parts of its blocks."""
        is_whole = not (offset | length) % self.limits.request_alignment
        if not (is_whole and self._server.export.flags & ExportFlag.SEND_TRIM):
            raise BlockError(errno.ENOTSUP)
        if there := self._there(offset, length):
            await self._server.request(lambda: Request(Command.TRIM, offset, there))

    async def driver_flush_to_disk(self) -> None:
        """The server does; one that takes no flush has nothing to flush."""
        if self._server.export.flags & ExportFlag.SEND_FLUSH and not self.read_only:
            await self._server.request(lambda: Request(Command.FLUSH))

    async def driver_truncate(self, length: int, preallocation: Preallocation) -> None:
        """An export has the size it has.

        Raises:
            BlockError: ENOTSUP: another one is asked for.
        """
        if length not in (self.length, self._server.export.size):
            raise BlockError(errno.ENOTSUP, "Cannot resize NBD nodes")

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        """What the server says, of one extent; data, if it says nothing."""
        export = self._server.export
        if export.context is None:
            return BlockStatus(StatusFlag.DATA | StatusFlag.OFFSET_VALID, length, map=offset)
        there = min(self._there(offset, length), align_down(_INT_MAX, export.min_block or 1))
        if not there:
            return BlockStatus(StatusFlag.ZERO, length)
        request = await self._server.request(
            lambda: Request(Command.BLOCK_STATUS, offset, there, flags=CommandFlag.REQ_ONE)
        )
        assert request.extent is not None
        run, state = request.extent
        align = export.min_block or 1
        if run % align:
            # Of a server that knows more than it should: whole blocks, or a block with something in it.
            run, state = (align_down(run, align), state) if run > align else (align, 0)
        if self.options.x_dirty_bitmap == _DEPTH and state > _ZERO:
            state = _ZERO  # how deep it is makes no difference
        flags = StatusFlag.OFFSET_VALID
        if not state & _HOLE:
            flags |= StatusFlag.DATA
        if state & _ZERO:
            flags |= StatusFlag.ZERO
        return BlockStatus(flags, min(run, there), map=offset)

    def can_discard(self) -> bool:
        """As the server says."""
        return bool(self._server.export.flags & ExportFlag.SEND_TRIM) and not self.read_only

    def driver_cancel_in_flight(self) -> None:
        """Do not wait for a server that has gone."""
        if self._link is not None:
            self._link.lose_patience()

    @property
    def _server(self) -> Link:
        assert self._link is not None
        return self._link

    def _there(self, offset: int, length: int) -> int:
        """How much of a range the server has."""
        return max(0, min(length, self._server.export.size - offset))


def _link(options: NbdOptions, owner: str) -> Link:
    context = _ALL if options.x_dirty_bitmap is None else options.x_dirty_bitmap
    delay, timeout = options.reconnect_delay, options.request_timeout
    return Link(options.address(), options.export or "", context, delay, timeout, owner)
