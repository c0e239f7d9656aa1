"""The disk of an export is exchanged, ejected and inserted under a guest that uses it (row B38), on both data paths.

The daemon runs on this test's loop, the guest in a thread.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar

import pytest

from tests.requirements import require
from vhostblk.block.keyval import parse_options
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import BlockError, ConfigError
from vhostblk.export.events import ExportEvent, MediumInserted, MediumRemoved
from vhostblk.export.options import parse_export
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.virtio.blk import RequestType

SIZE = 4 << 20
PIECE = 65536
_DEPTH = 16
_Result = TypeVar("_Result")
_CHANGES = 40

both_paths = pytest.mark.parametrize("data_path", ["native", "python"])
Scenario = Callable[[Daemon, list[ExportEvent]], Awaitable[None]]


@pytest.fixture
def images(tmp_path: Path) -> dict[str, Path]:
    """Two disks that can be told apart, a shorter and a read-only one."""
    found = {}
    for name, size in (("a", SIZE), ("b", SIZE), ("short", SIZE // 2), ("ro", SIZE)):
        found[name] = tmp_path / name
        found[name].write_bytes(name[0].encode() * size)
    return found


def run(
    images: dict[str, Path], socket: Path, data_path: str, scenario: Scenario
) -> list[ExportEvent]:
    require("engine")
    events: list[ExportEvent] = []
    nodes = [f"file,node-name={name},filename={path}" for name, path in images.items()]
    nodes[-1] += ",read-only=on"
    export = f"vhost-user-blk,id=e,node-name=a,writable=on,num-queues=2,addr.type=unix,addr.path={socket}"
    config = DaemonConfig(
        blockdevs=[parse_options(node, "driver") for node in nodes],
        exports=[parse_export(parse_options(export, "type"))],
        data_path=data_path,
    )

    async def everything() -> None:
        ready = asyncio.Event()
        daemon = Daemon(config, ready.set, events.append)
        running = asyncio.create_task(daemon.run())
        await ready.wait()
        try:
            await scenario(daemon, events)
        finally:
            daemon.stop()
            await running

    asyncio.run(everything())
    return events


class Guest:
    """Reads the first half in large pieces and writes tokens to the second half, until it is told to end."""

    def __init__(self, socket: Path) -> None:
        self.over = threading.Event()
        self.seen: list[bytes] = []
        self.tokens = 0
        self._socket = socket

    def run(self) -> None:
        with Client.connect(self._socket, queues=2) as client:
            while not self.over.is_set():
                reads = [
                    client.submit(RequestType.IN, n * PIECE, room=PIECE, queue=n % 2)
                    for n in range(_DEPTH)
                ]
                offset = SIZE // 2 + self.tokens * 4096 % (SIZE // 2)
                client.write(offset, token(self.tokens))
                self.tokens += 1
                client.wait(reads)
                self.seen += [read.result() for read in reads]
            client.flush()


def token(number: int) -> bytes:
    return b"%15d " % number * 256


@both_paths
@pytest.mark.timeout(120)
def test_every_request_is_of_the_old_disk_or_of_the_new_one_never_of_both(
    images: dict[str, Path], socket_directory: Path, data_path: str
) -> None:
    guest = Guest(socket_directory / "e")

    async def scenario(daemon: Daemon, events: list[ExportEvent]) -> None:
        running = asyncio.get_running_loop().run_in_executor(None, guest.run)
        export = daemon.exports["e"]
        try:
            for number in range(_CHANGES):
                wanted = export.statistics().requests + 50
                while export.statistics().requests < wanted and not running.done():  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
                await daemon.change_medium("e", "ba"[number % 2], force=True)
        finally:
            guest.over.set()
            await running
        if data_path == "native":
            assert export.statistics().hits > 0

    events = run(images, socket_directory / "e", data_path, scenario)
    assert len(events) == 2 * _CHANGES
    assert set(guest.seen) == {b"a" * PIECE, b"b" * PIECE}
    contents = {name: images[name].read_bytes() for name in "ab"}
    written = dict.fromkeys("ab", 0)
    for number in range(max(0, guest.tokens - SIZE // 2 // 4096), guest.tokens):
        at = SIZE // 2 + number * 4096 % (SIZE // 2)
        (home,) = (name for name in "ab" if contents[name][at : at + 4096] == token(number))
        written[home] += 1
        other = contents["ab".replace(home, "")][at : at + 4096]
        assert len({other[i : i + 16] for i in range(0, 4096, 16)}) == 1
    assert all(written.values())


@both_paths
def test_guest_is_told_of_a_disk_that_is_ejected_and_of_one_that_is_inserted(
    images: dict[str, Path], socket_directory: Path, data_path: str, expect_log: ExpectedLog
) -> None:
    expect_log.expect(r"flush failed: No medium found \(ENOMEDIUM\)")
    expect_log.allow("read failed: ")

    async def scenario(daemon: Daemon, events: list[ExportEvent]) -> None:
        loop = asyncio.get_running_loop()
        client = await loop.run_in_executor(None, Client.connect, socket_directory / "e")

        async def guest(function: Callable[..., _Result], *arguments: object) -> _Result:
            return await loop.run_in_executor(None, function, *arguments)

        try:
            client.strict = False
            await guest(client.write, 0, b"w" * 4096)
            with pytest.raises(ConfigError, match="is locked and force was not specified"):
                await daemon.remove_medium("e")
            with pytest.raises(ConfigError, match="has a medium already"):
                await daemon.insert_medium("e", "b")
            assert not events
            await daemon.remove_medium("e", force=True)
            await daemon.remove_medium("e")
            assert (await guest(client.wait_config_change)).capacity == 0
            for request in ((client.read, 0, 512), (client.flush,)):
                with pytest.raises(BlockError):
                    await guest(*request)
            # What was there before is safe.
            assert images["a"].read_bytes()[:4096] == b"w" * 4096
            for name, why in (("ro", "read-only"), ("x", "Cannot find")):
                with pytest.raises(ConfigError, match=why):
                    await daemon.insert_medium("e", name)
            await daemon.insert_medium("e", "short")
            config = await guest(client.wait_config_change)
            assert config.capacity == SIZE // 2 // 512
            assert await guest(client.read, SIZE // 2 - 512, 512) == b"s" * 512
            with pytest.raises(BlockError):
                await guest(client.read, SIZE // 2, 512)
            changes = [
                event for event in events if isinstance(event, MediumRemoved | MediumInserted)
            ]
            assert changes == [MediumRemoved("e", "a"), MediumInserted("e", "short")]
        finally:
            await guest(client.close)
        # Nobody uses it now, so it is not locked; and a daemon can end without a disk.
        await daemon.remove_medium("e")
        with pytest.raises(ConfigError, match="does not exist"):
            await daemon.remove_medium("f")

    run(images, socket_directory / "e", data_path, scenario)
