"""`snapshot=on`: what is written is seen, and is nowhere afterwards (row B33)."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from pathlib import Path

import pytest

from vhostblk.block.activation import activate, inactivate
from vhostblk.block.backend import BlockBackend
from vhostblk.block.chain import layers
from vhostblk.block.create import create_image
from vhostblk.block.graph import BlockGraph
from vhostblk.block.introspection import exact_filename, full_options
from vhostblk.block.iov import IoVec
from vhostblk.client.client import Client
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess

MIB = 1 << 20


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where overlays are."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def raw_image(path: Path) -> bytes:
    content = os.urandom(MIB)
    path.write_bytes(content)
    return content


def daemon(folder: Path, *options: str) -> DaemonProcess:
    command = [*VHOSTBLK, "storage-daemon"]
    for number, blockdev in enumerate(options):
        command += ["--blockdev", f"driver=raw,node-name=d{number},{blockdev}"]
        export = f"vhost-user-blk,id=e{number},node-name=d{number},writable=on,addr.type=unix"
        command += ["--export", f"{export},addr.path={folder}/{number}.sock"]
    return DaemonProcess(command, sockets=[folder / f"{n}.sock" for n in range(len(options))])


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_writes_are_seen_the_base_is_untouched_and_no_file_is_left(
    tmp_path: Path, temporary: Path, socket_directory: Path, end: signal.Signals
) -> None:
    """Two disks of one image: neither sees what the other writes."""
    image = tmp_path / "image"
    content = raw_image(image)
    blockdev = f"file.driver=file,file.filename={image},snapshot=on,discard=unmap"
    with daemon(socket_directory, blockdev, blockdev) as running:
        assert list(temporary.iterdir()) == []
        with (
            Client.connect(socket_directory / "0.sock") as one,
            Client.connect(socket_directory / "1.sock") as two,
        ):
            one.write(0, b"one".ljust(4096, b"1"))
            two.write(4096, b"two".ljust(4096, b"2"))
            one.flush()
            one.discard((8192, 65536))
            assert one.read(0, 8192) == b"one".ljust(4096, b"1") + content[4096:8192]
            assert two.read(0, 8192) == content[:4096] + b"two".ljust(4096, b"2")
            assert two.read(8192, 65536) == content[8192 : 8192 + 65536]
            assert one.config.capacity * 512 == MIB
        if end is signal.SIGKILL:
            running.kill()
        else:
            running.stop()
        assert list(temporary.iterdir()) == []
    assert image.read_bytes() == content


def test_overlay_is_the_node_that_was_asked_for(tmp_path: Path, temporary: Path) -> None:
    raw_image(tmp_path / "image")
    base = tmp_path / "base"
    raw_image(base)

    async def scenario() -> None:
        graph = BlockGraph()
        await create_image(
            graph, str(tmp_path / "top"), "qcow2", backing_file="base", backing_format="raw"
        )
        file = {"file.driver": "file", "file.filename": str(tmp_path / "top")}
        node = await graph.add(
            {
                "driver": "qcow2", "node-name": "d", "snapshot": "on", "discard": "unmap",
                "cache.direct": "on", "detect-zeroes": "unmap", **file,
            }
        )  # fmt: skip
        assert graph.find("d") is node
        overlay, top, below = layers(node)
        assert not overlay.read_only
        assert (overlay.unmap, overlay.detect_zeroes, overlay.no_flush) == (True, "unmap", True)
        assert not overlay.common.cache_direct
        assert (top.read_only, top.common.cache_direct, top.no_flush) == (True, True, False)
        assert below.read_only  # only the top layer has an overlay
        held = overlay.children["file"].node
        assert exact_filename(held).startswith(f"{temporary}/vl.")
        assert full_options(node)["backing"]["file"]["filename"] == str(tmp_path / "top")
        backend = BlockBackend(node, "the guest", writable=True, resize=True)
        await backend.pwritev(0, IoVec.of(b"x" * 512))
        await backend.truncate(2 * MIB)
        await backend.pwritev(2 * MIB - 512, IoVec.of(b"y" * 512))
        await backend.close()
        again = await graph.open_image(
            str(base), {"driver": "raw", "snapshot": True, "node-name": "e"}
        )
        assert again.length == MIB
        read_only = await graph.open_image(str(base), {"snapshot": True, "read-only": True})
        assert read_only.read_only
        plain = await graph.open_image(str(base), {"snapshot": "off", "read-only": True})
        assert plain.backing is None
        await graph.remove("d")
        assert top.node_name not in graph.nodes
        await graph.close_all()

    asyncio.run(scenario())
    assert list(temporary.iterdir()) == []


def test_overlay_of_an_image_that_is_somebody_elses_waits_with_it(
    tmp_path: Path, temporary: Path
) -> None:
    content = raw_image(tmp_path / "image")

    async def scenario() -> None:
        graph = BlockGraph()
        file = {"file.driver": "file", "file.filename": str(tmp_path / "image")}
        node = await graph.add({"driver": "raw", "snapshot": "on", "active": "off", **file})
        assert all(layer.inactive for layer in layers(node))
        backend = BlockBackend(node, "the guest", writable=True)
        with pytest.raises(BlockError) as caught:
            await backend.pwritev(0, IoVec.of(b"x" * 512))
        assert caught.value.errno == errno.EPERM
        await activate(graph)
        await backend.pwritev(0, IoVec.of(b"x" * 512))
        await inactivate(graph)
        await activate(graph)
        found = bytearray(1024)
        await backend.preadv(0, IoVec.of(found))
        assert found == b"x" * 512 + content[512:1024]
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_overlay_that_cannot_be_made_fails_the_whole_open_and_names_its_file(
    tmp_path: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw_image(tmp_path / "image")

    async def opened(message: str, number: int, snapshot: object = True) -> None:
        graph = BlockGraph()
        before = os.listdir("/proc/self/fd")
        with pytest.raises(ConfigError, match=message) as raised:
            await graph.open_image(str(tmp_path / "image"), {"driver": "raw", "snapshot": snapshot})
        assert raised.value.errno == number
        assert not graph.nodes
        await graph.close_all()
        assert os.listdir("/proc/self/fd") == before

    async def full(*_: object, **__: object) -> None:
        raise BlockError(errno.ENOSPC)

    asyncio.run(opened("expects 'on' or 'off'", errno.EINVAL, "maybe"))
    with monkeypatch.context() as patch:
        patch.setattr("vhostblk.block.create.create", full)
        asyncio.run(opened(f"Could not create temporary overlay '{temporary}/vl", errno.ENOSPC))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "missing"))
    asyncio.run(opened("Could not create a temporary file", errno.ENOENT))
    monkeypatch.setenv("TMPDIR", "/" + "x" * 4100)
    asyncio.run(opened("name of a temporary file is too long", errno.EOVERFLOW))
    assert list(temporary.iterdir()) == []
