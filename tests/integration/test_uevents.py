"""What is heard of block devices: real messages of the kernel about a loop device (which needs root)."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.probes import LoopDevice, loop_device
from vhostblk.block.uevents import Uevents

Heard = list[int | None]
Scenario = Callable[[Uevents, Heard], Awaitable[None]]
_BURST = 3000
"""Messages that no socket holds."""


@pytest.fixture
def device(tmp_path: Path) -> Iterator[LoopDevice]:
    pytest.importorskip("pyroute2")
    image = tmp_path / "device.img"
    image.write_bytes(bytes(1 << 20))
    with loop_device(image) as found:
        yield found


def number(device: LoopDevice) -> int:
    return os.stat(device.path).st_rdev


def listen(scenario: Scenario) -> Heard:
    async def everything() -> Heard:
        heard: Heard = []
        uevents = Uevents(heard.append)
        try:
            await scenario(uevents, heard)
        finally:
            uevents.close()
            uevents.close()
        return heard

    return asyncio.run(everything())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


def test_device_that_changes_is_named(device: LoopDevice) -> None:
    async def scenario(_uevents: Uevents, heard: Heard) -> None:
        def has_come(before: int) -> bool:
            return heard.count(number(device)) > before

        for action in ("change", "remove", "add"):
            before = heard.count(number(device))
            device.announce(action)
            await until(partial(has_come, before))
        device.resize(2 << 20)
        await until(lambda: heard.count(number(device)) >= 4)

    listen(scenario)


def test_lost_messages_may_have_been_of_any_device(device: LoopDevice) -> None:
    async def scenario(_uevents: Uevents, heard: Heard) -> None:
        for _ in range(_BURST):  # while nobody reads
            device.announce("change")
        await until(lambda: None in heard)
        # It is heard as before.
        await until(lambda: heard[-1] == number(device))
        heard.clear()
        device.announce("change")
        await until(lambda: number(device) in heard)

    listen(scenario)


def test_only_the_kernel_is_believed(device: LoopDevice) -> None:
    async def scenario(uevents: Uevents, heard: Heard) -> None:
        port = uevents._socket.getsockname()[0]
        family = socket.AF_NETLINK
        with socket.socket(family, socket.SOCK_DGRAM, uevents._socket.proto) as liar:
            liar.bind((0, 0))
            lie = b"change@/devices/x\0SUBSYSTEM=block\0MAJOR=7\0MINOR=99\0"
            liar.sendto(lie, (port, 0))
        device.announce("change")
        await until(lambda: number(device) in heard)
        assert os.makedev(7, 99) not in heard

    listen(scenario)


def test_what_makes_no_sense_may_have_been_of_any_device() -> None:
    pytest.importorskip("pyroute2")

    async def scenario(uevents: Uevents, heard: Heard) -> None:
        of_a_disk = b"change@/d\0ACTION=change\0SUBSYSTEM=block\0"
        for message in (
            of_a_disk,
            of_a_disk + b"MAJOR=7\0",
            of_a_disk + b"MAJOR=x\0MINOR=1\0",
            of_a_disk + b"MAJOR=99999999999999999999\0MINOR=1\0",
        ):
            heard.clear()
            uevents._hear(message)
            assert heard == [None], message
        heard.clear()
        uevents._hear(b"add@/d\0SUBSYSTEM=net\0MAJOR=7\0MINOR=1\0")
        uevents._hear(b"")
        assert not heard
        uevents._hear(of_a_disk + b"MAJOR=7\0MINOR=1\0DEVNAME=\xff\xfe\0")
        assert heard in ([os.makedev(7, 1)], [None])  # by version of pyroute2

    listen(scenario)
