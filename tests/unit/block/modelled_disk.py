"""A disk on some graph, its users, and the model that all of their requests are compared with.

Theory of operation: everything runs on a `ScheduledLoop`. A request is told to the model before it is made and when it
is over, whatever it came to; so is what an engine does, which uses extents on its own as the native one does. Errors
have to be those that were asked for (`crash_disk.INJECTED`). Offsets in the model are those of the leaf.

`check` looks at everything that has to be so when nothing is going on; `power_cut` at any time.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any

from tests.unit.block.crash_disk import CrashDisk, CrashHostIO
from tests.unit.block.disk_model import DiskModel, noise
from tests.unit.block.fakes import PassNode
from tests.unit.block.slow_nodes import SIZE, DirectFile, Overlay, SlowFile, SlowMemory
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.extent import PastWrites
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.leaky_bucket import ThrottleLimits
from vhostblk.block.length import resize
from vhostblk.block.node import BlockNode, ExtentFlag, Req
from vhostblk.block.permissions import Perm, parents_first
from vhostblk.block.throttle_group import ThrottleGroup
from vhostblk.errors import BlockError, ConfigError

__all__ = ["Disk", "Engine"]

FUA = int(Req.FUA)


_DRIVERS = {
    **DRIVERS,
    **{
        driver.driver_name: driver
        for driver in (SlowFile, DirectFile, SlowMemory, Overlay, PassNode, CrashDisk)
    },
}


_FILES = (SlowFile.driver_name, DirectFile.driver_name)


class _InOrder(dict[Any, None]):
    """A set, whose order is not that of addresses: a schedule can be repeated."""

    def add(self, value: Any) -> None:
        self[value] = None

    def discard(self, value: Any) -> None:
        self.pop(value, None)


class _Graph(BlockGraph):
    def enter(self, node: BlockNode) -> None:
        super().enter(node)
        node.tracker.requests = _InOrder()  # type: ignore[assignment]


class Disk:
    """See the module.

    Args:
        leaf: options of the node at the bottom, whose name is `leaf`; `{file}` is a path.
        layers: options of the nodes above it, from the bottom up, without their child.
        file: where a file may be.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.model = DiskModel(SIZE)
        self.users: list[BlockBackend] = []
        self.engines: list[Engine] = []
        self.may_fail: set[int] = set()
        """Errors that may come now."""
        self.refused = 0
        self._file = file
        self._numbers = itertools.count(1)
        self._keeps_data = True
        self._keeps_promises = True

    async def open(self, leaf: Mapping[str, Any], *layers: Mapping[str, Any]) -> None:
        """Build the graph."""
        self.graph = _Graph(_DRIVERS)
        self.io = CrashHostIO(SIZE)
        self.graph._host_io.update({None: self.io, "threads": self.io})
        limits = ThrottleLimits(iops_total=50, bps_write=100_000)
        self.graph.throttle_groups["tg"] = ThrottleGroup("tg", limits)
        options = {"node-name": "leaf", **leaf}
        if options["driver"] in _FILES:
            assert self._file is not None
            self._file.write_bytes(bytes(SIZE))
            # A run that fails leaves it open; the next one is none of its business.
            options |= {"filename": str(self._file), "locking": "off"}
        if options["driver"] == "overlay":
            base = {"driver": "crash-disk", "node-name": "base", "discard": "unmap"}
            node = await self.graph.add(base)
            assert isinstance(node, CrashDisk)
            node.data[:] = noise(0, SIZE)
            options["backing"] = "base"
            self.model.end_write(self.model.begin_write(0, noise(0, SIZE), "base"), True, True)
        self._keeps_data = options["driver"] != "null-co"
        self._keeps_promises = options["driver"] in ("crash-disk", *_FILES)
        self.leaf = await self.graph.add(options)
        top = self.leaf
        for number, layer in enumerate(layers):
            key = self.graph.drivers.find(layer["driver"]).child_keys[0]
            top = await self.graph.add({"node-name": f"layer{number}", **layer, key: top.node_name})
        self.top = top

    async def close(self) -> None:
        """Give everything back."""
        for user in self.users:
            await user.close()
        await self.graph.close_all()

    def use(self, node: BlockNode, *, write_cache: bool = True) -> BlockBackend:
        """A new user of a node, who may write."""
        user = BlockBackend(
            node,
            f"user {len(self.users)}",
            writable=True,
            write_cache=write_cache,
            shared=Perm.ALL,
        )
        self.users.append(user)
        return user

    def engine(self, user: BlockBackend) -> Engine:
        """Somebody who uses the extents of a user."""
        engine = Engine(self, user)
        self.engines.append(engine)
        return engine

    def base(self, node: BlockNode) -> int:
        """Where a node begins in the leaf."""
        offset = 0
        while node is not self.leaf:
            offset += getattr(node.options, "offset", 0)
            node = next(iter(node.children.values())).node
        return offset

    # ------------------------------------------------------------------ requests

    def allow(self, error: BlockError) -> None:
        """An error has come.

        Raises:
            BlockError: nobody has asked for it.
        """
        self.refused += 1
        if error.errno == errno.EIO and any(
            node.children and node.length % node.limits.request_alignment
            for node in self.graph.nodes.values()
        ):
            return  # its last block is behind the end of what is below: docs/limits.md
        if error.errno not in self.may_fail:
            raise error

    async def write(
        self, user: BlockBackend, offset: int, memory: IoVec, flags: int = 0, zero: bool = False
    ) -> bool:
        """Fill the memory and write it; returns whether that went well."""
        length = memory.length
        content = bytes(length) if zero else noise(next(self._numbers), length)
        memory.copy_from(content)
        durable = bool(flags & FUA) or not user.write_cache
        request = user.pwritev(offset, memory, flags)
        return await self._write(user, offset, content, request, durable)

    async def write_zeroes(
        self, user: BlockBackend, offset: int, length: int, may_unmap: bool, flags: int = 0
    ) -> bool:
        """Make a range read as zeroes."""
        durable = bool(flags & FUA) or not user.write_cache
        request = user.pwrite_zeroes(offset, length, may_unmap, flags)
        return await self._write(user, offset, bytes(length), request, durable)

    async def _write(
        self,
        user: BlockBackend,
        offset: int,
        content: bytes,
        request: Coroutine[Any, Any, None],
        durable: bool,
    ) -> bool:
        write = self.model.begin_write(self.base(user.node) + offset, content)
        done = False
        try:
            await request
            done = True
        except BlockError as error:
            self.allow(error)
        finally:
            self.model.end_write(write, done, durable)
        return done

    async def discard(self, user: BlockBackend, offset: int, length: int) -> None:
        """Give a range up."""
        write = self.model.begin_discard(self.base(user.node) + offset, length)
        done = False
        try:
            await user.pdiscard(offset, length)
            done = True
        except BlockError as error:
            self.allow(error)
        finally:
            self.model.end_write(write, done)

    async def read(self, user: BlockBackend, offset: int, memory: IoVec) -> None:
        """Read and compare."""
        read = self.model.begin_read(self.base(user.node) + offset, memory.length)
        content = None
        try:
            await user.preadv(offset, memory)
            content = memory.tobytes() if self._keeps_data else None
        except BlockError as error:
            self.allow(error)
        finally:
            self.model.end_read(read, content)

    async def flush(self, user: BlockBackend) -> bool:
        """Flush; returns whether that went well."""
        flush = self.model.begin_flush()
        done = False
        try:
            await user.flush()
            done = True
        except BlockError as error:
            self.allow(error)
        finally:
            self.model.end_flush(flush, done)
        return done

    async def resize(self, length: int) -> None:
        """Change the length of the leaf; what is cut off is lost, whoever uses it."""
        before = self.model.length
        cut = self.model.begin_discard(length, before - length) if length < before else None
        try:
            await resize(self.graph, self.users[0], self.leaf, length)
        except BlockError as error:
            self.allow(error)
        except ConfigError as error:
            assert "resize" in str(error)  # noqa: PT017
        finally:
            if cut is not None:
                self.model.end_write(cut, True)
            if self.leaf.length != before:
                self.model.resize(self.leaf.length)

    # ------------------------------------------------------------------ what must be so

    def _stored(self) -> tuple[bytes, list[tuple[int, bytes]]]:
        cache = self.leaf.cache if isinstance(self.leaf, CrashDisk) else self.io.cache
        return bytes(cache.kept[: self.model.length]), cache.lost()

    def power_cut(self) -> None:
        """See what would be left.

        Raises:
            AssertionError: less than was promised.
        """
        if self._keeps_promises:
            kept, lost = self._stored()
            self.model.check_after_power_cut(kept.ljust(self.model.length, b"\0"), lost)

    async def check(self) -> None:
        """Nothing is going on; see what is left.

        Raises:
            AssertionError: something that should not be.
        """
        self.power_cut()
        for node in self.graph.nodes.values():
            assert not node.in_flight, node
            assert not node.quiesced, node
            assert not node.subtree_quiesced, node
            assert not node.tracker.requests, node
            assert not node.tracker.serialising, node
            assert not node.flush_queue, node
            assert not node.flush_active, node
            assert node.bouncing._value == 64, node
        for user in self.users:
            assert not user.in_flight
            assert not user.quiesced
            assert not user._queued
        assert self.leaf.length == self.model.length
        if self._keeps_data:
            content = bytearray(self.model.length)
            reader = BlockBackend(self.leaf, "the model", writable=False, shared=Perm.ALL)
            try:
                await reader.preadv(0, IoVec.of(content))
            finally:
                await reader.close()
            self.model.check(bytes(content))

    def nodes(self) -> list[BlockNode]:
        """From the top down to the leaf."""
        return [node for node in parents_first([self.top]) if node.node_name != "base"]


class Engine:
    """Stands in for the native engine: reads, writes and flushes what extents let it, and gives all back when asked."""

    def __init__(self, disk: Disk, user: BlockBackend) -> None:
        self.hits = 0
        self._disk = disk
        self._user = user
        self._busy: list[tuple[int, int, asyncio.Future[None]]] = []
        self._flushing: list[asyncio.Future[None]] = []
        self._writes = PastWrites()
        user.attach(
            revoke=self._revoke, revoke_flush=self._revoke_flush, take_writes=self._take_writes
        )

    def _take_writes(self, ranges: bool) -> PastWrites:
        taken, self._writes = self._writes, PastWrites()
        return taken

    async def _revoke(self, offset: int, length: int) -> None:
        while waiting := [
            done for start, end, done in self._busy if start < offset + length and offset < end
        ]:
            await asyncio.wait(waiting)

    async def _revoke_flush(self) -> None:
        while self._flushing:
            await asyncio.wait(tuple(self._flushing))

    async def request(self, offset: int, memory: IoVec, is_write: bool) -> bool:
        """Do a request alone; False: not allowed to."""
        length, disk, user = memory.length, self._disk, self._user
        extents = await user.extents(offset, length)
        # From here to the submission nobody comes in between, as an extent demands.
        way = ExtentFlag.WRITE if is_write else ExtentFlag.READ
        if len(extents) != 1 or not length or not extents[0].flags & way:
            return False
        extent = extents[0]
        if not extent.offset <= offset <= offset + length <= extent.end or extent.fd is None:
            return False
        if (offset | length) % extent.request_alignment or not memory.is_aligned(
            extent.memory_alignment
        ):
            return False
        at = extent.host_offset + offset - extent.offset
        done = asyncio.get_running_loop().create_future()
        entry = (offset, offset + length, done)
        self._busy.append(entry)
        self.hits += 1
        base = disk.base(user.node) + offset
        try:
            if is_write:
                content = noise(next(disk._numbers), length)
                write = disk.model.begin_write(base, content, "engine")
                written = False
                try:
                    await disk.io.pwritev(extent.fd, at, IoVec.of(content))
                    written = True
                except BlockError as error:
                    disk.allow(error)
                finally:
                    writes = self._writes
                    self._writes = PastWrites(
                        writes.count + 1, max(writes.highest, offset + length)
                    )
                    disk.model.end_write(write, written)
            else:
                read = disk.model.begin_read(base, length)
                result = None
                try:
                    await disk.io.preadv(extent.fd, at, memory)
                    result = memory.tobytes()
                except BlockError as error:
                    disk.allow(error)
                finally:
                    disk.model.end_read(read, result)
        finally:
            self._busy.remove(entry)
            done.set_result(None)
        return True

    async def flush(self) -> bool:
        """Flush alone; False: not allowed to, or it failed."""
        target = self._user.flush_target()
        # One at a time, as in native/src/flush.c.
        if not isinstance(target, int) or self._flushing:
            return False
        disk, done = self._disk, asyncio.get_running_loop().create_future()
        self._flushing.append(done)
        flush = disk.model.begin_flush()
        succeeded = False
        try:
            await disk.io.fdatasync(target)
            succeeded = True
        except BlockError as error:
            self._user.flush_failed(error.errno or errno.EIO)
            disk.allow(error)
        finally:
            disk.model.end_flush(flush, succeeded)
            self._flushing.remove(done)
            done.set_result(None)
        return succeeded
