"""Our image locks and QEMU's keep each other out, and say which permission it was."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.requirements import require
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.permissions import Perm
from vhostblk.errors import ConfigError


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(65536))
    return path


def qemu_io(image: Path, *options: str) -> str:
    """Open with qemu-io; what it complains about."""
    command = [require("qemu-io", group="qemu"), *options, "-f", "raw", "-c", "read 0 512"]
    done = subprocess.run(
        [*command, str(image)], capture_output=True, text=True, timeout=30, check=False
    )
    return done.stderr


@pytest.fixture
def held_by_qemu(image: Path) -> Iterator[Path]:
    """The image, opened for writing by a qemu-io that waits for commands."""
    command = [require("qemu-io", group="qemu"), "-f", "raw", str(image)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("length\n")
        process.stdin.flush()
        while "64 KiB" not in process.stdout.readline():
            assert process.poll() is None
        yield image
        process.stdin.close()
        process.wait(30)


def open_here(image: Path, *, writable: bool, **options: str) -> None:
    """Open, use and close the image as an export does."""

    async def scenario() -> None:
        graph = BlockGraph()
        try:
            node = await graph.add({"driver": "file", "filename": str(image), **options})
            backend = BlockBackend(node, "export 'disk0'", writable=writable)
            await backend.close()
        finally:
            await graph.close_all()

    asyncio.run(scenario())


def test_qemu_cannot_write_an_image_that_we_hold(image: Path) -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add({"driver": "file", "node-name": "d", "filename": str(image)})
        assert qemu_io(image) == ""  # nobody uses it yet
        for writable in (True, False):
            backend = BlockBackend(node, "export 'disk0'", writable=writable)
            assert 'Failed to get "write" lock' in qemu_io(image)
            assert qemu_io(image, "-r") == ""
            await backend.close()
            assert qemu_io(image) == ""
        shared = BlockBackend(node, "export 'disk0'", writable=True, shared=Perm.ALL)
        assert qemu_io(image) == ""
        await shared.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_we_cannot_use_an_image_that_qemu_writes(held_by_qemu: Path) -> None:
    for writable in (True, False):
        with pytest.raises(ConfigError) as caught:
            open_here(held_by_qemu, writable=writable)
        assert str(caught.value) == (
            'Failed to get shared "write" lock: is another process using the image '
            f"[{held_by_qemu}]?"
        )


def test_force_share_and_locking_off_look_on(held_by_qemu: Path) -> None:
    open_here(held_by_qemu, writable=False, **{"read-only": "on", "force-share": "on"})
    open_here(held_by_qemu, writable=True, locking="off")


def test_qemu_storage_daemon_and_we_keep_each_other_out(image: Path, tmp_path: Path) -> None:
    daemon = require("qemu-storage-daemon", group="qemu")

    def command(pidfile: Path) -> list[str]:
        return [
            daemon,
            "--blockdev",
            f"driver=file,node-name=d,filename={image}",
            "--export",
            f"type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={tmp_path}/s",
            "--pidfile",
            str(pidfile),
        ]

    async def while_we_hold_it() -> str:
        graph = BlockGraph()
        node = await graph.add({"driver": "file", "filename": str(image)})
        backend = BlockBackend(node, "export 'disk0'", writable=True)
        process = await asyncio.create_subprocess_exec(
            *command(tmp_path / "pid1"), stderr=asyncio.subprocess.PIPE
        )
        _, errors = await asyncio.wait_for(process.communicate(), 30)
        await backend.close()
        await graph.close_all()
        assert process.returncode == 1
        return errors.decode()

    assert 'Failed to get "write" lock' in asyncio.run(while_we_hold_it())

    async def while_it_holds_it() -> None:
        pidfile = tmp_path / "pid2"
        process = await asyncio.create_subprocess_exec(*command(pidfile))
        try:
            async with asyncio.timeout(30):
                while not (pidfile.exists() and pidfile.read_text().strip()):
                    assert process.returncode is None
                    await asyncio.sleep(0.01)
            graph = BlockGraph()
            node = await graph.add({"driver": "file", "filename": str(image)})
            with pytest.raises(ConfigError, match='Failed to get shared "write" lock'):
                BlockBackend(node, "export 'disk0'", writable=True)
            await graph.close_all()
        finally:
            process.terminate()
            await process.wait()

    asyncio.run(while_it_holds_it())
