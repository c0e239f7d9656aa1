"""Storage with a volatile cache, for tests that cut its power: a block driver, and file I/O below the real ones.

Theory of operation: a request takes effect, and is then answered, in two callbacks of the loop of their own, so that a
`ScheduledLoop` lets others overtake it before, in between and after. Like the kernel's it cannot be cancelled. What is
written is seen by reads at once, and stays in the cache until a flush that began after it was answered, or for ever if
that flush fails and the storage is like a page cache (`forgets`).

Knows nothing about the pipeline.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tests.unit.block.fakes import ArrayNode
from vhostblk.block.flags import Preallocation
from vhostblk.block.host_io import (
    FALLOC_FL_PUNCH_HOLE,
    FALLOC_FL_ZERO_RANGE,
    Completion,
    HostIO,
    fallocate,
    read_all,
    write_all,
)
from vhostblk.block.iov import IoVec
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import Req
from vhostblk.block.options import BOOLEAN, INTEGER, SIZE, NodeOptions, option
from vhostblk.errors import BlockError
from vhostblk.native import IOPart

__all__ = ["INJECTED", "CrashDisk", "CrashHostIO", "VolatileCache"]

T = TypeVar("T")
FUA = int(Req.FUA)
INJECTED = errno.EREMOTEIO
"""What fails on purpose fails with this."""


class VolatileCache:
    """What is on the disk for certain, and what may be.

    Attributes:
        kept: what a power cut leaves for certain.
        pending: (number, offset, content) of what may get lost, or not: each of them.
    """

    def __init__(self, size: int) -> None:
        self.kept = bytearray(size)
        self.pending: list[tuple[int, int, bytes]] = []
        self.written = 0

    def write(self, offset: int, content: bytes, durable: bool = False) -> None:
        """Something was written."""
        self.written += 1
        if not durable:
            self.pending.append((self.written, offset, content))
            return
        self._keep(offset, content)
        end = offset + len(content)
        # What is older there is not in the cache any more.
        self.pending = [
            (number, at, part)
            for number, start, old in self.pending
            for at, part in _without(start, old, offset, end)
        ]

    def flush(self, until: int) -> None:
        """Keep all writes up to this number."""
        for number, offset, content in self.pending:
            if number <= until:
                self._keep(offset, content)
        self.pending = [entry for entry in self.pending if entry[0] > until]

    def forget(self, until: int) -> None:
        """All writes up to this number will never reach the disk."""
        self.pending = [entry for entry in self.pending if entry[0] > until]

    def resize(self, size: int) -> None:
        """What is behind the end is gone for ever."""
        self.kept[:] = self.kept[:size].ljust(size, b"\0")
        self.pending = [
            (number, at, part)
            for number, start, old in self.pending
            for at, part in _without(start, old, size, 1 << 62)
        ]

    def lost(self) -> list[tuple[int, bytes]]:
        """Writes of which a power cut may leave any."""
        return [(offset, content) for _, offset, content in self.pending]

    def _keep(self, offset: int, content: bytes) -> None:
        end = offset + len(content)
        self.kept.extend(bytes(max(end - len(self.kept), 0)))
        self.kept[offset:end] = content


def _without(start: int, content: bytes, low: int, high: int) -> list[tuple[int, bytes]]:
    end = start + len(content)
    if end <= low or high <= start:
        return [(start, content)]
    found: list[tuple[int, bytes]] = []
    if start < low:
        found.append((start, content[: low - start]))
    if high < end:
        found.append((high, content[high - start :]))
    return found


async def _take_effect(effect: Callable[[], T]) -> T:
    outcome: T = await _taking_effect(effect)
    return outcome


def _taking_effect(effect: Callable[[], Any]) -> Completion:
    loop = asyncio.get_running_loop()
    completion = Completion(loop=loop)

    def act() -> None:
        try:
            result = effect()
        except BaseException as error:
            loop.call_soon(completion.set_exception, error)
        else:
            loop.call_soon(completion.set_result, result)

    loop.call_soon(act)
    return completion


class Failures:
    """What is to fail: each once."""

    def __init__(self) -> None:
        self.planned: list[str] = []

    def happens(self, kind: str) -> bool:
        """Whether this one fails."""
        if kind in self.planned:
            self.planned.remove(kind)
            return True
        return False


@dataclass(frozen=True, slots=True)
class CrashOptions:
    """Limits and abilities; everything is small."""

    size: int = option(SIZE, 8192, about="bytes")
    align: int = option(INTEGER, 1, about="request alignment")
    max_transfer: int = option(INTEGER, 0, about="blocks of the largest transfer")
    max_iov: int = option(INTEGER, 1024, about="elements of a vector")
    memory: int = option(INTEGER, 1, about="alignment of memory")
    fua: bool = option(BOOLEAN, False, about="can write through its cache")
    zeroes: bool = option(BOOLEAN, True, about="can write zeroes")
    unit: int = option(INTEGER, 0, about="blocks that zero-writes and discards like")


class CrashDisk(ArrayNode):
    """A disk; insists on its limits."""

    driver_name = "crash-disk"
    options_type = CrashOptions
    is_protocol = True

    def __init__(self, name: str, common: NodeOptions, options: CrashOptions) -> None:
        self._asked = options
        super().__init__(
            options.size, write_flags=FUA * options.fua, zeroes=options.zeroes, common=common
        )
        self.node_name, self.options = name, options
        self.compute_limits()
        self.cache = VolatileCache(len(self.data))
        self.failures = Failures()
        self.flushes = 0

    def refresh_limits(self) -> None:
        """As asked."""
        asked, align = self._asked, self._asked.align
        self.limits = BlockLimits(
            request_alignment=align,
            max_transfer=asked.max_transfer * align,
            pwrite_zeroes_alignment=asked.unit * align,
            pdiscard_alignment=asked.unit * align,
            max_pwrite_zeroes=asked.unit * align * 2,
            max_pdiscard=asked.unit * align * 3,
            min_mem_alignment=asked.memory,
            max_iov=asked.max_iov,
        )

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        self._check(offset, length, self.limits.max_transfer)
        self._check_iov(length, iov)

        def effect() -> None:
            self._fail("read")
            iov.copy_from(self.data[offset : offset + length])

        await _take_effect(effect)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        if offset + length > len(self.data):
            self.data.extend(bytes(offset + length - len(self.data)))
        self._check(offset, length, self.limits.max_transfer)
        self._check_iov(length, iov)
        assert not flags & ~self.supported_write_flags

        def effect() -> None:
            content = iov.tobytes()
            if self.failures.happens("write"):
                self._put(offset, content[: length // 2], False)
                raise BlockError(INJECTED)
            self._put(offset, content, bool(flags & FUA))

        await _take_effect(effect)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._check(offset, length, self.limits.max_pwrite_zeroes)
        assert not flags & ~self.supported_zero_flags
        if not self._zeroes:
            raise BlockError(errno.ENOTSUP)

        def effect() -> None:
            self._fail("zero")
            self._put(offset, bytes(length), False)

        await _take_effect(effect)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        assert length > 0
        assert not self.limits.max_pdiscard or length <= self.limits.max_pdiscard

        def effect() -> None:
            self._fail("discard")
            self._put(offset, b"\xdd" * length, False)

        await _take_effect(effect)

    async def driver_flush_to_disk(self) -> None:
        until = self.cache.written

        def effect() -> None:
            self.flushes += 1
            self._fail("flush")
            self.cache.flush(until)

        await _take_effect(effect)

    async def driver_truncate(
        self, length: int, preallocation: Preallocation = Preallocation.OFF
    ) -> None:
        def effect() -> None:
            self._fail("truncate")
            self.data[:] = self.data[:length].ljust(length, b"\0")
            self.cache.resize(length)

        await _take_effect(effect)

    def content(self) -> bytes:
        """What reads see."""
        return bytes(self.data)

    def _put(self, offset: int, content: bytes, durable: bool) -> None:
        self.data[offset : offset + len(content)] = content
        self.cache.write(offset, content, durable)

    def _fail(self, kind: str) -> None:
        if self.failures.happens(kind):
            raise BlockError(INJECTED)


class CrashHostIO(HostIO):
    """File I/O on one real file whose page cache has a model here; for `file` and `memory` nodes.

    A failed flush tells of it once, and what it should have written is lost: the next one succeeds without it.

    Args:
        size: of the file.
    """

    kind = "crash"

    def __init__(self, size: int) -> None:
        super().__init__()
        self.cache = VolatileCache(size)
        self.failures = Failures()

    async def preadv(self, fd: int, offset: int, iov: IoVec) -> int:
        """See `HostIO.preadv`."""

        def effect() -> int:
            self._fail("read")
            return read_all(fd, offset, iov)

        return await _take_effect(effect)

    async def pwritev(self, fd: int, offset: int, iov: IoVec, dsync: bool = False) -> None:
        """See `HostIO.pwritev`."""

        def effect() -> None:
            if self.failures.happens("write"):
                part = iov.slice(0, iov.length // 2)
                write_all(fd, offset, part)
                self.cache.write(offset, part.tobytes())
                raise BlockError(INJECTED)
            content = iov.tobytes()
            write_all(fd, offset, IoVec.of(content))
            self.cache.write(offset, content, dsync)

        await _take_effect(effect)

    async def fdatasync(self, fd: int) -> None:
        """See `HostIO.fdatasync`."""
        until = self.cache.written

        def effect() -> None:
            if self.failures.happens("flush"):
                self.cache.forget(until)
                raise BlockError(INJECTED)
            self.cache.flush(until)

        completion = _taking_effect(effect)
        try:
            await completion
        except asyncio.CancelledError as cancelled:
            if completion.done():
                cancelled.__cause__ = completion.exception()
            raise

    async def fallocate(self, fd: int, mode: int, offset: int, length: int) -> None:
        """See `HostIO.fallocate`."""

        def effect() -> None:
            self._fail("zero")
            fallocate(fd, mode, offset, length)
            if mode & (FALLOC_FL_PUNCH_HOLE | FALLOC_FL_ZERO_RANGE):
                self.cache.write(offset, bytes(length))

        await _take_effect(effect)

    async def transfer(self, parts: Sequence[IOPart], *, write: bool) -> int:
        """See `HostIO.transfer`."""
        done = 0
        for fd, offset, buffer in parts:
            iov = IoVec([memoryview(buffer)])
            if write:
                await self.pwritev(fd, offset, iov)
                done += iov.length
            elif (count := await self.preadv(fd, offset, iov)) < iov.length:
                return done + count
            else:
                done += count
        return done

    def _start(self, function: Callable[..., Any], *arguments: Any) -> Completion:
        """See `HostIO.call`."""

        def effect() -> Any:
            result = function(*arguments)
            if function is os.ftruncate:
                self.cache.resize(arguments[1])
            return result

        return _taking_effect(effect)

    async def close(self) -> None:
        """There are no threads."""

    def _fail(self, kind: str) -> None:
        if self.failures.happens(kind):
            raise BlockError(INJECTED)
