"""What Python does for one request of 4 KiB, layer by layer, in one thread without a guest.

    python -m tests.bench.python_request

A RAM disk behind a filter that does nothing, as in `make bench-python`. The least of many repetitions counts, so that
other programs change little. The last line has everything from the engine's message to the answer; the engine is a
stand-in.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import random
import time
from collections.abc import Callable, Coroutine
from itertools import islice
from typing import Any

from tests.bench.pass_through import PassThroughNode
from vhostblk import native
from vhostblk.block import pipeline
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.eager import begin
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.export.blk_device import BlkDevice
from vhostblk.export.error_log import ErrorLog
from vhostblk.export.io_thread import IOThread
from vhostblk.export.native_path import NativeDataPath
from vhostblk.export.stats_page import StatsPage
from vhostblk.native import Message, MessageType
from vhostblk.virtio.blk import RequestType

_BLOCK = 4096
_REQUESTS = 64
_REPETITIONS = 500
_DISK = 64 << 20


class Engine:
    """Has requests to say, and takes the answers; in place of `native.EngineThread`."""

    def __init__(self) -> None:
        self.requests: list[Message] = []
        self._left = iter(self.requests)
        self.answers = 0
        self.are_alike = True

    def refill(self) -> None:
        """The same requests again."""
        self._left = iter(self.requests)

    def receive(self) -> list[Message]:
        """A batch."""
        return list(islice(self._left, native.EngineThread.BATCH))

    def send(self, messages: list[bytes]) -> int:
        """Take all."""
        self.answers += len(b"".join(messages)) // 64
        return len(messages)


class NoEvents:
    """Nothing can happen here."""

    def queue_broken(self, index: int, reason: str) -> None:
        """Never."""

    def queue_lost(self, reason: str) -> None:
        """Never."""

    def memory_faulted(self) -> None:
        """Never."""

    def log_lost(self) -> None:
        """Never."""


async def main() -> None:
    """Measure and print."""
    graph = BlockGraph({**DRIVERS, "pass-through": PassThroughNode})
    top = await graph.add(f"pass-through,node-name=d,file.driver=memory,file.size={_DISK}")
    backend = BlockBackend(top, "bench", writable=True)
    (edge,) = top.children.values()
    memory = memoryview(mmap.mmap(-1, _REQUESTS * _BLOCK))
    pieces = [memory[n * _BLOCK : (n + 1) * _BLOCK] for n in range(_REQUESTS)]
    chance = random.Random(1)
    places = [chance.randrange(_DISK // _BLOCK) * _BLOCK for _ in pieces]
    for place in range(0, _DISK, 1 << 20):
        await backend.pwritev(place, IoVec.of(chance.randbytes(1 << 20)))

    def all_of(work: Callable[[int, IoVec], Coroutine[Any, Any, None]]) -> Callable[[], None]:
        def run() -> None:
            for place, piece in zip(places, pieces, strict=True):
                begin(work(place, IoVec([piece])))

        return run

    leaf = edge.node
    device = BlkDevice(
        backend,
        serial="",
        num_queues=1,
        max_segments=1,
        logical_block_size=None,
        errors=ErrorLog(logging.LoggerAdapter(logging.getLogger(__name__))),
    )
    device.set_features(device.offered_features)
    thread, page, engine = IOThread("bench"), StatsPage.private("bench", 1), Engine()
    path = NativeDataPath(device, [thread], NoEvents(), page)
    await path.open()
    path._queues.memory = native.Memory([])  # what a front-end would have given, for whoever asks
    addresses = [native.address_of(piece) for piece in pieces]

    def everything(kind: RequestType) -> Callable[[], None]:
        def message(n: int) -> Message:
            head = (int(MessageType.REQUEST), 0, 0, n, path._disk.id)
            return (*head, places[n], _BLOCK, addresses[n], 1, 0, int(kind))

        requests = [message(n) for n in range(_REQUESTS)]

        def run() -> None:
            engine.requests = requests
            engine.refill()
            real, thread._thread = thread._thread, engine  # type: ignore[assignment]
            wanted = engine.answers + _REQUESTS
            while engine.answers < wanted:
                thread._receive()
            thread._thread = real

        return run

    layers = {
        "driver": (
            all_of(lambda place, iov: leaf.driver_preadv(place, _BLOCK, iov)),
            all_of(lambda place, iov: leaf.driver_pwritev(place, _BLOCK, iov, 0)),
        ),
        "one node": (
            all_of(lambda place, iov: pipeline.preadv(leaf.lane, place, iov)),
            all_of(lambda place, iov: pipeline.pwritev(leaf.lane, place, iov)),
        ),
        "two nodes": (all_of(backend.preadv), all_of(backend.pwritev)),
        "all": (everything(RequestType.IN), everything(RequestType.OUT)),
    }
    print(f"{'us of CPU':12}{'read':>8}{'write':>8}")
    for name, (read, write) in layers.items():
        print(f"{name:12}{_least(read):8.2f}{_least(write):8.2f}")
    await path.close()
    await thread.close()
    await backend.close()
    await graph.close_all()
    page.close()


def _least(run: Callable[[], None]) -> float:
    """Microseconds of a request."""
    least = float("inf")
    for _ in range(_REPETITIONS):
        began = time.perf_counter()
        run()
        least = min(least, time.perf_counter() - began)
    return least / _REQUESTS * 1e6


if __name__ == "__main__":
    asyncio.run(main())
