"""What a data path tells the block layer of the writes that it serves alone: how much, how far, and where.

The daemon runs on this test's loop, guests in threads. Both data paths are held to the same: to whoever asks a node
(flush, highest offset, dirty maps), it makes no difference who has served a write.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.requirements import require
from tests.unit.block.fakes import PassNode
from vhostblk.block import surgery
from vhostblk.block.backend import BlockBackend
from vhostblk.block.dirty_map import DirtyMap, collect, record, stop_recording
from vhostblk.block.iov import IoVec
from vhostblk.block.keyval import parse_options
from vhostblk.block.node import BlockNode
from vhostblk.block.permissions import Perm
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.export.options import parse_export
from vhostblk.virtio.blk import RequestType

MIB = 1 << 20
SIZE = 8 * MIB
PATHS = pytest.mark.parametrize("path", ["native", "python"])


@dataclass
class Served:
    """A daemon with one export of a file, `f`, below `d`."""

    daemon: Daemon
    socket: Path
    image: Path

    @property
    def file(self) -> BlockNode:
        return self.daemon.graph.find("f")

    @property
    def top(self) -> BlockNode:
        return self.daemon.graph.find("d")

    @property
    def backend(self) -> BlockBackend:
        return self.daemon.exports["e"].device.backend

    def counted(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for name, operation in self.daemon.exports["e"].statistics().operations.items():
            counts[name] += operation.requests
            counts[f"bytes of {name}"] += operation.bytes
            assert not operation.errors
        return counts

    def by_engine(self) -> int:
        return self.daemon.exports["e"].statistics().hits


@asynccontextmanager
async def served(folder: Path, path: str, raw: str = "") -> AsyncIterator[Served]:
    image, socket = folder / "image", folder / "socket"
    image.write_bytes(bytes(SIZE))
    node = f"raw,node-name=d,discard=unmap{raw},file.driver=file,file.node-name=f,file.filename={image}"
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,num-queues=2,addr.type=unix,addr.path={socket}"
    config = DaemonConfig(
        blockdevs=[parse_options(f"{node},file.discard=unmap", "driver")],
        exports=[parse_export(parse_options(export, "type"))],
        data_path=path,
    )
    ready = asyncio.Event()
    daemon = Daemon(config, ready.set)
    daemon.graph.drivers.register(PassNode)
    running = asyncio.create_task(daemon.run())
    await asyncio.wait_for(ready.wait(), 20)
    try:
        yield Served(daemon, socket, image)
    finally:
        daemon.stop()
        await asyncio.wait_for(running, 20)


def run(
    path: str,
    folder: Path,
    scenario: Callable[[Served], Coroutine[Any, Any, None]],
    raw: str = "",
) -> None:
    if path == "native":
        require("engine")

    async def everything() -> None:
        async with served(folder, path, raw) as export:
            await scenario(export)

    asyncio.run(everything())


# ---------------------------------------------------------------------- how much: flushes


@PATHS
def test_flush_of_the_block_layer_is_skipped_exactly_if_nobody_has_written(
    path: str, socket_directory: Path
) -> None:
    """Row B19.4: what the engine wrote alone counts, and what it only read does not."""

    async def scenario(export: Served) -> None:
        file = export.file
        synced = 0
        real = file.driver_flush_to_disk

        async def count() -> None:
            nonlocal synced
            synced += 1
            await real()

        file.driver_flush_to_disk = count  # type: ignore[method-assign]

        async def syncs_of_a_flush(user: BlockBackend) -> int:
            before = synced
            await user.flush()
            return synced - before

        # Somebody else flushes, from a node further below.
        visitor = BlockBackend(file, "a visitor", writable=True, shared=Perm.ALL)
        client = await asyncio.to_thread(Client.connect, export.socket)
        await asyncio.to_thread(client.write, 0, bytes(4096))
        await export.backend.flush()
        for number in range(20):
            user = export.backend if number % 2 else visitor
            assert await syncs_of_a_flush(user) == 0
            await asyncio.to_thread(client.read, 0, 4096)
            assert await syncs_of_a_flush(user) == 0
            hits = export.by_engine()
            await asyncio.to_thread(client.write, number * 4096, bytes(4096))
            assert path == "python" or export.by_engine() == hits + 1
            assert await syncs_of_a_flush(user) == 1
        await asyncio.to_thread(client.close)
        await visitor.close()

    run(path, socket_directory, scenario)


# ---------------------------------------------------------------------- how far


@PATHS
def test_highest_offset_has_what_the_engine_wrote(path: str, socket_directory: Path) -> None:
    """Row B24.4: of every node, in its own bytes."""

    async def scenario(export: Served) -> None:
        client = await asyncio.to_thread(Client.connect, export.socket)
        for end in (4096, 2048, 65536, 8192, MIB, 512):
            await asyncio.to_thread(client.write, end - 512, bytes(512))
            highest = max(512, export.top.highest_offset(), end)
            assert export.top.highest_offset() == highest
            assert export.file.highest_offset() == highest + 4096
            await export.top.revoke(0, export.top.length)
        # A discard is none, and what failed is one.
        await asyncio.to_thread(client.discard, (2 * MIB, 4096))
        assert export.top.highest_offset() == MIB
        await asyncio.to_thread(client.close)

    run(path, socket_directory, scenario, ",offset=4096")


# ---------------------------------------------------------------------- where


@dataclass
class Guest:
    """Writes, zeroes and discards at random, and knows where."""

    socket: Path
    touched: list[tuple[int, int]] = field(default_factory=list)
    done: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    """Requests and bytes by operation."""
    stop: threading.Event = field(default_factory=threading.Event)

    def work(self) -> None:
        choice = random.Random(3)
        with Client.connect(self.socket, queues=2) as client:
            pending = []
            while not self.stop.is_set() or self.done < 200:
                offset = choice.randrange(SIZE // 2 // 512 - 256) * 512
                length = choice.choice([512, 4096, 4096, 65536, 512 * choice.randrange(1, 256)])
                kind = choice.randrange(20)
                name = (
                    ["discard", "write_zeroes", "read", "read", "read"][kind]
                    if kind < 5
                    else "write"
                )
                self.counts[name] += 1
                self.counts[f"bytes of {name}"] += length
                if kind == 0:
                    client.discard((offset, length))
                elif kind == 1:
                    client.write_zeroes((offset, length), unmap=bool(choice.randrange(2)))
                elif kind < 5:
                    client.read(offset, length)
                else:
                    queue = choice.randrange(2)
                    pending.append(
                        client.submit(RequestType.OUT, offset, out=bytes(length), queue=queue)
                    )
                if not 2 <= kind < 5:
                    self.touched.append((offset, length))
                if len(pending) == 16:
                    client.wait(pending)
                    assert not any(one.status for one in pending)
                    pending.clear()
                self.done += 1
            client.wait(pending)


class Disturber:
    """Does to the graph what makes it take extents back."""

    def __init__(self, export: Served) -> None:
        self._export = export
        self._choice = random.Random(5)
        self._filters: list[BlockNode] = []
        self.touched: list[tuple[int, int]] = []

    async def disturb(self) -> None:
        export, choice = self._export, self._choice
        node = choice.choice([export.file, export.top, *self._filters])
        match choice.randrange(7):
            case 0:
                await node.revoke(choice.randrange(SIZE), 4096)
            case 1:
                await node.revoke(0, node.length)
            case 2:
                await node.drained_begin()
                node.drained_end()
            case 3:
                self._filters.append(
                    await surgery.insert_filter(export.daemon.graph, node, {"driver": "pass"})
                )
            case 4 if self._filters:
                await surgery.drop_filter(export.daemon.graph, self._filters.pop())
            case 5:
                os.truncate(export.image, export.image.stat().st_size + 65536)
                await export.top.refresh_length()
            case _:
                await self._write()

    async def _write(self) -> None:
        """By Python, from the side, and not aligned to anything."""
        user = BlockBackend(self._export.top, "a visitor", writable=True, shared=Perm.ALL)
        offset, length = self._choice.randrange(SIZE // 2), self._choice.randrange(1, 9000)
        await user.pwritev(offset, IoVec.of(bytes(length)))
        await user.close()
        self.touched.append((offset, length))


def granules(ranges: list[tuple[int, int]], grain: int, shift: int = 0) -> set[int]:
    return {
        index
        for offset, length in ranges
        for index in range((offset + shift) // grain, (offset + shift + length - 1) // grain + 1)
    }


@PATHS
@pytest.mark.timeout(120)
def test_dirty_maps_have_exactly_what_was_written_by_whoever(
    path: str, socket_directory: Path
) -> None:
    """Rows B16.12 and B29.7, under load, while extents come and go and the disk grows."""

    async def scenario(export: Served) -> None:
        top, file = export.top, export.file
        maps = {
            DirtyMap(top.length, 65536): (top, 0),
            DirtyMap(file.length, 512): (file, 4096),
        }
        found: dict[DirtyMap, set[int]] = {dirty: set() for dirty in maps}
        for dirty, (node, _) in maps.items():
            await record(node, dirty)

        def take() -> None:
            for dirty, (node, _) in maps.items():
                collect(node)
                found[dirty] |= granules(dirty.take(), dirty.granularity)

        guest = Guest(export.socket)
        working = asyncio.create_task(asyncio.to_thread(guest.work))
        disturber = Disturber(export)
        for number in range(80):
            await disturber.disturb()
            wanted = guest.done + 10
            while guest.done < wanted and not working.done():  # noqa: ASYNC110 - it is a thread
                await asyncio.sleep(0.0005)
            if number % 5 == 0:
                take()
        guest.stop.set()
        await working
        assert path == "python" or export.by_engine() > 100
        take()
        touched = disturber.touched + guest.touched
        for dirty, (node, shift) in maps.items():
            assert found[dirty] == granules(touched, dirty.granularity, shift)
            await stop_recording(node, dirty)
        # Each request was counted once, whoever has served it, and however often it was given back.
        async with asyncio.timeout(10):
            while export.counted() != guest.counts:  # noqa: ASYNC110 - a driver may know first
                await asyncio.sleep(0.001)
        statistics = export.daemon.exports["e"].statistics()
        assert statistics.hits + statistics.misses == statistics.requests == guest.done

    run(path, socket_directory, scenario, ",offset=4096")
