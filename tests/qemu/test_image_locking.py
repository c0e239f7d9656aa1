"""Our image locks and QEMU's keep each other out, and say which permission it was."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.locks import held_by_qemu, qemu_io
from tests.requirements import require
from vhostblk.block.backend import BlockBackend
from vhostblk.block.graph import BlockGraph
from vhostblk.block.permissions import Perm
from vhostblk.errors import ConfigError


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
        # What users here share with each other is not shared with other processes.
        first, second = (
            BlockBackend(node, "export 'disk0'", writable=True, shared=Perm.ALL) for _ in range(2)
        )
        for backend in (first, second):
            assert 'Failed to get "write" lock' in qemu_io(image)
            await backend.close()
        assert qemu_io(image) == ""
        await graph.close_all()

    asyncio.run(scenario())


def test_we_cannot_use_an_image_that_qemu_writes(image: Path) -> None:
    with held_by_qemu(image):
        for writable in (True, False):
            with pytest.raises(ConfigError) as caught:
                open_here(image, writable=writable)
            assert str(caught.value) == (
                f'Failed to get shared "write" lock: is another process using the image [{image}]?'
            )


def test_force_share_and_locking_off_look_on(image: Path) -> None:
    with held_by_qemu(image):
        open_here(image, writable=False, **{"read-only": "on", "force-share": "on"})
        open_here(image, writable=True, locking="off")


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
