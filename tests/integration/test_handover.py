"""Two daemons, one image: whoever's queues run has it, and no byte is lost on the way (row B40)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.requirements import require
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import ConfigError, PeerError
from vhostblk.export.options import ExportConfig
from vhostblk.testing.plugin import ExpectedLog

_SIZE = 1 << 20
_ROUNDS = 12
_BLOCK = 4096


async def start(image: Path, socket: Path, data_path: str) -> tuple[Daemon, asyncio.Task[None]]:
    ready = asyncio.Event()
    config = DaemonConfig(
        blockdevs=[{"driver": "file", "node-name": "d", "filename": str(image)}],
        exports=[ExportConfig(id="e", node_name="d", socket_path=str(socket), writable=True)],
        data_path=data_path,
    )
    daemon = Daemon(config, ready.set)
    running = asyncio.create_task(daemon.run())
    await asyncio.wait([running, asyncio.create_task(ready.wait())], return_when="FIRST_COMPLETED")
    return daemon, running


def block(number: int) -> bytes:
    return number.to_bytes(8, "little") * (_BLOCK // 8)


@pytest.mark.parametrize("data_path", ["native", "python"])
def test_image_goes_back_and_forth_between_two_daemons_whose_front_ends_stay(
    tmp_path: Path, socket_directory: Path, data_path: str, expect_log: ExpectedLog
) -> None:
    require("engine")
    expect_log.expect("refused SET_VRING")
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(_SIZE))

    async def everything() -> None:
        async def guest(function: Callable[..., object], *arguments: object) -> object:
            return await asyncio.to_thread(function, *arguments)

        sockets = [socket_directory / "a", socket_directory / "b"]
        running, daemons, clients = [], [], []
        try:
            for socket in sockets:
                daemon, task = await start(image, socket, data_path)
                daemons.append(daemon)
                running.append(task)
                client = await asyncio.to_thread(Client.connect, socket)
                clients.append(client)
                with pytest.raises(ConfigError, match="in use"):
                    await daemon.inactivate("e")
                await guest(client.stop_queue, 0)
                await daemon.inactivate("e")
            expected = bytearray(_SIZE)
            for number in range(1, _ROUNDS + 1):
                mine, other = number % 2, 1 - number % 2
                client = clients[mine]
                await guest(client.start_queue, 0)  # that takes the image
                assert await guest(client.read, 0, _SIZE // 2) == bytes(expected[: _SIZE // 2])
                for offset in range(0, _SIZE // 2, 7 * _BLOCK):
                    await guest(client.write, offset, block(number))
                    expected[offset : offset + _BLOCK] = block(number)
                if number == 1:
                    with pytest.raises(PeerError):
                        await guest(clients[other].start_queue, 0)
                    with pytest.raises(ConfigError, match="lock"):
                        await daemons[other].activate("e")
                await guest(client.stop_queue, 0)
                await daemons[mine].inactivate("e")
                assert image.read_bytes() == expected
        finally:
            for client in clients:
                await guest(client.close)
            for daemon in daemons:
                daemon.stop()
            await asyncio.gather(*running)

    asyncio.run(everything())
