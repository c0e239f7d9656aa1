"""A disk on an NBD server in the same loop, and a loop whose time is the test's."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from tests.disks import opened, read
from tests.nbd_server import Server
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers.nbd import NbdNode
from vhostblk.errors import BlockError

SECONDS = 20  # after which something hangs
Scenario = Callable[[BlockBackend], Awaitable[None]]


class Clock(asyncio.SelectorEventLoop):
    """A loop in which hours pass at once."""

    def __init__(self) -> None:
        self._skipped = 0.0
        super().__init__()
        self._end = super().time() + 60
        self.set_debug(True)  # as tests/event_loops.py
        self.slow_callback_duration = float("inf")

    def time(self) -> float:
        """What is skipped counts."""
        now = super().time()
        assert now < getattr(self, "_end", now + 1), "it hangs"
        return now + self._skipped

    def skip(self, seconds: float) -> None:
        """So much later."""
        self._skipped += seconds


def skip(seconds: float) -> None:
    """Have time pass on a `Clock`."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, Clock)
    loop.skip(seconds)


def run(
    server: Server,
    path: Path,
    scenario: Scenario,
    options: Mapping[str, object] | None = None,
    *,
    clock: type[Clock] | None = None,
) -> None:
    """Serve, open the disk, use it, close all."""

    async def everything() -> None:
        deadline = SECONDS if clock is None else None  # it has its own
        async with asyncio.timeout(deadline), server.serving(path):
            server_options = {"type": "unix", "path": str(path)}
            flat = {"driver": "nbd", "discard": "unmap", "server": server_options}
            async with opened(lambda graph: graph.add(flat | dict(options or {}))) as backend:
                await scenario(backend)

    with asyncio.Runner(loop_factory=clock) as runner:
        runner.run(everything())


async def connections(server: Server, count: int) -> None:
    """Wait until there have been so many."""
    while server.connections < count:  # noqa: ASYNC110 - it is the server's business who waits for it
        await asyncio.sleep(0)


async def connected(backend: BlockBackend) -> None:
    """Wait until hands were shaken: the server counts a connection before."""
    node = backend.node
    assert isinstance(node, NbdNode)
    while node._link is None or node._link._connection is None:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def requests(server: Server, count: int) -> None:
    """Wait until there have been so many."""
    while len(server.requests) < count:  # noqa: ASYNC110
        await asyncio.sleep(0)


async def reads_again(backend: BlockBackend) -> None:
    """Wait until the server is there again: nobody waits for it, but it is being looked for."""
    while True:
        try:
            assert await read(backend, 0, 512) == bytes(512)
            break
        except BlockError as error:
            assert error.errno == errno.EIO  # noqa: PT017
        await asyncio.sleep(0)
