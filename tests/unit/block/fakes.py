"""Nodes made for tests: a byte array that insists on its limits, and helpers to run coroutines."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

from vhostblk.block.edge import Edge
from vhostblk.block.flags import Preallocation, StatusFlag
from vhostblk.block.iov import IoVec, address_of
from vhostblk.block.limits import BlockLimits
from vhostblk.block.node import BlockNode, OpenContext, Req, Role
from vhostblk.block.options import NodeOptions
from vhostblk.block.permissions import Perm
from vhostblk.block.status import BlockStatus
from vhostblk.errors import BlockError

T = TypeVar("T")

EASY = BlockLimits(request_alignment=1, min_mem_alignment=1)


def run_now(coro: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that must not suspend, without an event loop."""
    try:
        coro.send(None)
    except StopIteration as stop:
        result: T = stop.value
        return result
    coro.close()
    raise AssertionError("the coroutine suspended")


@dataclass(frozen=True)
class NoOptions:
    """A driver without options of its own."""


@dataclass
class Recorder:
    """What a fake driver was asked to do: (operation, offset, length, flags)."""

    calls: list[tuple[str, int, int, int]] = field(default_factory=list)

    def of(self, operation: str) -> list[tuple[int, int]]:
        """(offset, length) of all calls of one kind, in order."""
        return [(offset, length) for kind, offset, length, _ in self.calls if kind == operation]

    def count(self, operation: str) -> int:
        """How many calls of one kind."""
        return len(self.of(operation))


class ArrayNode(BlockNode):
    """Bytes in a bytearray, behind whatever limits a test wants; every request is checked against them.

    `data` is what reads see, `durable` what would survive a power cut. `pause` is awaited in every operation, before
    it takes effect; `fail` may raise. The last block may reach past `length`.
    """

    driver_name = "array"
    options_type: ClassVar[type[Any]] = NoOptions

    def __init__(
        self,
        size: int = 65536,
        limits: BlockLimits = EASY,
        *,
        write_flags: int = 0,
        zero_flags: int = int(Req.MAY_UNMAP),
        zeroes: bool = True,
        discards: bool = True,
        common: NodeOptions | None = None,
    ) -> None:
        super().__init__("array", common or NodeOptions(discard="unmap"), NoOptions())
        self.length = size
        self.limits = replace(limits)
        self.limits.check()
        self.supported_write_flags = write_flags
        self.supported_zero_flags = zero_flags
        room = -(-size // limits.request_alignment) * limits.request_alignment
        self.data = bytearray(room)
        self.durable = bytearray(room)
        self.asked = Recorder()
        self.pause: Callable[[], Awaitable[object]] | None = None
        self.fail: Callable[[str, int, int], None] | None = None
        self._zeroes = zeroes
        self._discards = discards

    async def _begin(self, kind: str, offset: int, length: int, flags: int = 0) -> None:
        self.asked.calls.append((kind, offset, length, flags))
        if self.pause is not None:
            await self.pause()
        if self.fail is not None:
            self.fail(kind, offset, length)

    def _check(self, offset: int, length: int, limit: int) -> None:
        align = self.limits.request_alignment
        assert length > 0
        assert offset % align == 0
        assert length % align == 0
        assert not limit or length <= limit
        assert offset + length <= len(self.data), "behind the last block"

    def _check_iov(self, length: int, iov: IoVec) -> None:
        assert iov.length == length
        assert len(iov.views) <= self.limits.max_iov
        memory, request = self.limits.min_mem_alignment, self.limits.request_alignment
        for view in iov.views:
            assert address_of(view) % memory == 0
            # Less than a block cannot be asked of a request that is one block.
            assert len(view) % min(memory, request) == 0

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        self._check(offset, length, self.limits.max_transfer)
        self._check_iov(length, iov)
        await self._begin("read", offset, length)
        iov.copy_from(self.data[offset : offset + length])

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        if offset + length > len(self.data):
            self.data.extend(bytes(offset + length - len(self.data)))
            self.durable.extend(bytes(offset + length - len(self.durable)))
        self._check(offset, length, self.limits.max_transfer)
        self._check_iov(length, iov)
        assert not flags & ~self.supported_write_flags
        await self._begin("write", offset, length, flags)
        self._store(offset, iov.tobytes(), flags)

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        self._check(offset, length, self.limits.max_pwrite_zeroes)
        assert not flags & ~self.supported_zero_flags
        await self._begin("zero", offset, length, flags)
        if not self._zeroes:
            raise BlockError(errno.ENOTSUP)
        self._store(offset, bytes(length), flags)

    async def driver_pdiscard(self, offset: int, length: int) -> None:
        # Discards come unaligned too (row B18.3).
        assert length > 0
        assert not self.limits.max_pdiscard or length <= self.limits.max_pdiscard
        await self._begin("discard", offset, length)
        if not self._discards:
            raise BlockError(errno.ENOTSUP)
        self.data[offset : offset + length] = b"\xdd" * length

    async def driver_flush_to_os(self) -> None:
        await self._begin("flush-os", 0, 0)

    async def driver_flush_to_disk(self) -> None:
        before = bytes(self.data)
        await self._begin("flush", 0, 0)
        self.durable[:] = before + self.data[len(before) :]

    async def driver_truncate(
        self, length: int, preallocation: Preallocation = Preallocation.OFF
    ) -> None:
        await self._begin("truncate", 0, length)
        for content in (self.data, self.durable):
            content[:] = content[:length].ljust(length, b"\0")

    async def refresh_length(self) -> None:
        self.set_length(len(self.data))

    def can_discard(self) -> bool:
        return self._discards

    def _store(self, offset: int, content: bytes, flags: int) -> None:
        end = offset + len(content)
        self.data[offset:end] = content
        if flags & Req.FUA:
            self.durable[offset:end] = content


class CowNode(ArrayNode):
    """A layer over a backing node, in clusters; `allocated` says which are its own."""

    driver_name = "cow"
    child_keys = ("backing",)

    def __init__(
        self, backing: BlockNode | None, size: int, cluster: int = 512, **rest: Any
    ) -> None:
        super().__init__(size, **rest)
        self.cluster_size = cluster
        self.allocated: set[int] = set()
        if backing is not None:
            edge = Edge(self, backing, "backing", Role.COW, Perm.CONSISTENT_READ, Perm.ALL)
            edge.attach()
            self.children["backing"] = edge

    def child_perm(self, edge: Edge, perm: Perm, shared: Perm) -> tuple[Perm, Perm]:
        return Perm.CONSISTENT_READ, Perm.ALL

    def clusters(self, offset: int, length: int) -> range:
        return range(offset // self.cluster_size, -(-(offset + length) // self.cluster_size))

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        await super().driver_preadv(offset, length, iov)
        # Those of this very moment: what is written from here on is not in `iov`.
        for number in [n for n in self.clusters(offset, length) if n not in self.allocated]:
            start = max(offset, number * self.cluster_size)
            end = min(offset + length, (number + 1) * self.cluster_size)
            part = iov.slice(start - offset, end - start)
            if self.backing is None:
                part.zero(0, part.length)
            else:
                await self.children["backing"].preadv(start, part)

    async def driver_pwritev(self, offset: int, length: int, iov: IoVec, flags: int) -> None:
        await self._own(offset, length)
        await super().driver_pwritev(offset, length, iov, flags)
        self.allocated |= set(self.clusters(offset, length))

    async def driver_pwrite_zeroes(self, offset: int, length: int, flags: int) -> None:
        await self._own(offset, length)
        await super().driver_pwrite_zeroes(offset, length, flags)
        self.allocated |= set(self.clusters(offset, length))

    async def _own(self, offset: int, length: int) -> None:
        """Copy on write, of what is not overwritten wholly; atomic, unlike a real driver's."""
        for number in self.clusters(offset, length):
            start = number * self.cluster_size
            whole = offset <= start and start + self.cluster_size <= offset + length
            if number not in self.allocated and not whole and self.backing is not None:
                old = bytearray(min(self.cluster_size, self.length - start))
                iov = IoVec.of(old)
                await self.children["backing"].preadv(start, iov)
                if number not in self.allocated:
                    self.data[start : start + len(old)] = old

    async def driver_block_status(self, offset: int, length: int, precise: bool) -> BlockStatus:
        mine = offset // self.cluster_size in self.allocated
        end = offset
        while end < offset + length and (end // self.cluster_size in self.allocated) == mine:
            end = (end // self.cluster_size + 1) * self.cluster_size
        flags = StatusFlag.DATA if mine else StatusFlag(0)
        return BlockStatus(flags, min(end - offset, length))


class PassNode(BlockNode):
    """The smallest filter."""

    driver_name = "pass"
    options_type = NoOptions
    is_filter = True
    child_keys = ("file",)
    supported_write_flags = int(Req.FUA)
    supported_zero_flags = int(Req.FUA | Req.MAY_UNMAP)

    async def open(self, context: OpenContext) -> None:
        edge = await context.open_child(self, "file", Role.FILTERED | Role.PRIMARY)
        self.length = edge.node.length


def put_above(child: BlockNode, name: str = "above", kind: type[PassNode] = PassNode) -> PassNode:
    """A filter on a child, without a graph."""
    node = kind(name, NodeOptions(discard="unmap"), NoOptions())
    edge = Edge(node, child, "file", Role.FILTERED | Role.PRIMARY, Perm.ALL, Perm.ALL)
    edge.attach()
    node.children["file"] = edge
    node.length = child.length
    node.limits = replace(EASY)
    return node


async def turns(count: int) -> None:
    """Let the other tasks go on, this many times."""
    for _ in range(count):
        await asyncio.sleep(0)
