"""The daemon as a library: several in one process, in threads or on one loop, without touching its signals."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from vhostblk.block.keyval import parse_options
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import ConfigError
from vhostblk.export.options import ExportConfig, parse_export
from vhostblk.testing.plugin import ExpectedLog


def configuration(folder: Path, name: str) -> DaemonConfig:
    export = f"vhost-user-blk,id={name},node-name=d,writable=on,addr.type=unix,addr.path="
    return DaemonConfig(
        blockdevs=[parse_options("memory,node-name=d,size=1M", "driver")],
        exports=[parse_export(parse_options(f"{export}{folder / name}", "type"))],
        pid_file=folder / f"{name}.pid",
    )


def use(folder: Path, name: str) -> None:
    with Client.connect(folder / name) as client:
        client.write(0, name.encode() * 512)
        assert client.read(0, 512) == (name.encode() * 512)[:512]


def test_two_daemons_on_two_loops_in_two_threads(socket_directory: Path) -> None:
    """Signals belong to the process: a daemon in a thread does without."""
    ready = {name: threading.Event() for name in ("a", "b")}
    stops: dict[str, Callable[[], object]] = {}

    def live(name: str) -> None:
        async def serve() -> None:
            daemon = Daemon(configuration(socket_directory, name), ready[name].set)
            loop = asyncio.get_running_loop()
            stops[name] = lambda: loop.call_soon_threadsafe(daemon.stop)
            await daemon.run()

        asyncio.run(serve())

    threads = {name: threading.Thread(target=live, args=name) for name in ("a", "b")}
    for name, thread in threads.items():
        thread.start()
        assert ready[name].wait(10)
    try:
        use(socket_directory, "a")
        use(socket_directory, "b")
        stops["a"]()
        threads["a"].join(10)
        assert not (socket_directory / "a").exists()
        use(socket_directory, "b")
    finally:
        for stop in stops.values():
            with suppress(RuntimeError):  # its loop has ended
                stop()
        for thread in threads.values():
            thread.join(10)
    assert os.listdir(socket_directory) == []


def test_two_daemons_on_one_loop(socket_directory: Path) -> None:
    async def scenario() -> None:
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
        ready = {name: asyncio.Event() for name in ("a", "b")}
        daemons = {
            name: Daemon(configuration(socket_directory, name), ready[name].set)
            for name in ("a", "b")
        }
        running = {name: asyncio.create_task(daemon.run()) for name, daemon in daemons.items()}
        async with asyncio.timeout(10):
            for event in ready.values():
                await event.wait()
            for name in ("a", "b"):
                await asyncio.to_thread(use, socket_directory, name)
            daemons["a"].stop()
            await running["a"]
            await asyncio.to_thread(use, socket_directory, "b")
            daemons["b"].stop()
            await running["b"]
        assert handlers == {number: signal.getsignal(number) for number in handlers}

    asyncio.run(scenario())
    assert os.listdir(socket_directory) == []


def test_daemon_that_cannot_start_leaves_nothing(socket_directory: Path) -> None:
    good = configuration(socket_directory, "a")
    bad = ExportConfig(id="b", node_name="d", socket_path=f"{socket_directory}/nowhere/s")

    async def scenario() -> None:
        for config in (
            DaemonConfig(good.blockdevs, exports=[*good.exports, bad], pid_file=good.pid_file),
            DaemonConfig(good.blockdevs, exports=[*good.exports, *good.exports]),
            DaemonConfig(exports=good.exports),
            DaemonConfig(good.blockdevs, exports=good.exports, pid_file=socket_directory),
        ):
            with pytest.raises(ConfigError):
                await Daemon(config).run()
            assert os.listdir(socket_directory) == []

    asyncio.run(scenario())


def test_stop_before_the_start_has_ended_is_a_stop(
    socket_directory: Path, expect_log: ExpectedLog
) -> None:
    async def scenario() -> None:
        daemon = Daemon(configuration(socket_directory, "a"))
        daemon.stop()
        async with asyncio.timeout(10):
            await daemon.run()

    asyncio.run(scenario())
    assert os.listdir(socket_directory) == []
    assert expect_log.messages == []
