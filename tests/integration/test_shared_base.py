"""One base, many overlays, in several daemons and in QEMU's tools: all read, nobody writes (rows B32 and B09)."""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
from pathlib import Path

import pytest

from tests.qcow2_images import MIB, check, contents, create, qemu_img, qemu_io
from vhostblk.block.backing import drop_intermediate
from vhostblk.block.chain import layers
from vhostblk.block.commit import commit
from vhostblk.block.graph import BlockGraph
from vhostblk.client.client import Client
from vhostblk.errors import ConfigError
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.requirements import require


def daemon(sockets: Path, name: str, *images: Path) -> DaemonProcess:
    command = [*VHOSTBLK, "storage-daemon"]
    paths = []
    for image in images:
        node, path = image.name, sockets / f"{name}-{image.name}.sock"
        file = f"file.driver=file,file.filename={image}"
        command += ["--blockdev", f"qcow2,node-name={node},{file}"]
        export = f"vhost-user-blk,id={node},node-name={node},writable=on,addr.type=unix"
        command += ["--export", f"{export},addr.path={path}"]
        paths.append(path)
    return DaemonProcess(command, sockets=paths)


def writes_of_qemu(image: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["qemu-io", "-c", "write -P 1 0 512", image],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize("base_format", ["qcow2", "raw"])
def test_overlays_in_several_processes_share_their_base_and_nobody_writes_it(
    tmp_path: Path, socket_directory: Path, base_format: str
) -> None:
    require("qemu-img")
    require("qemu-io")
    root, base = tmp_path / "root", tmp_path / "base"
    root.write_bytes(random.Random(1).randbytes(MIB))
    if base_format == "qcow2":
        create(base, MIB, "-b", "root", "-F", "raw")
        qemu_io(base, "write -P 5 64k 64k")
    else:
        base.write_bytes(root.read_bytes())
    content = contents(base, tmp_path) if base_format == "qcow2" else base.read_bytes()
    before = base.read_bytes()
    names = ("one", "two", "three", "four")
    images = [create(tmp_path / name, MIB, "-b", "base", "-F", base_format) for name in names]
    with (
        daemon(socket_directory, "a", *images[:2]) as first,
        daemon(socket_directory, "b", images[2]) as second,
    ):
        clients = [
            Client.connect(socket_directory / name) for name in ("a-one.sock", "a-two.sock", "b-three.sock")
        ]  # fmt: skip
        for number, client in enumerate(clients):
            client.write(number * 4096, bytes([number + 1]) * 4096)
        for number, client in enumerate(clients):
            model = bytearray(content)
            model[number * 4096 : number * 4096 + 4096] = bytes([number + 1]) * 4096
            assert client.read(0, MIB) == model
        # QEMU shares, too, and keeps out of what others have.
        assert "Is another process using" not in writes_of_qemu(images[3]).stderr
        assert "lock" in writes_of_qemu(base).stderr
        assert "lock" in writes_of_qemu(images[0]).stderr
        assert qemu_img("info", base)

        async def committed() -> None:
            graph = BlockGraph()
            node = await graph.open_image(str(images[3]), {"driver": "qcow2"})
            with pytest.raises(ConfigError) as raised:
                await commit(graph, node)
            assert raised.value.errno in (errno.EACCES, errno.EAGAIN)
            assert "lock" in str(raised.value)
            await graph.close_all()

        asyncio.run(committed())
        for client in clients:
            client.close()
        first.stop()
        second.stop()
        commit_alone(images[3])
    for image in images:
        assert check(image) == ""
    assert base.read_bytes() != before  # the last one was alone
    for number, image in enumerate(images[:3]):
        assert (
            contents(image, tmp_path)[number * 4096 : number * 4096 + 4096]
            == bytes([number + 1]) * 4096
        )


def commit_alone(image: Path) -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        await commit(graph, await graph.open_image(str(image), {"driver": "qcow2"}))
        await graph.close_all()

    asyncio.run(scenario())


def test_layer_that_an_overlay_in_another_process_needs_is_not_changed_by_a_drop(
    tmp_path: Path, socket_directory: Path
) -> None:
    """The overlay here is put on the base; the one there goes on with the layer in between."""
    require("qemu-img")
    base, mid = (
        create(tmp_path / "base", MIB),
        create(tmp_path / "mid", MIB, "-b", "base", "-F", "qcow2"),
    )
    here, there = (
        create(tmp_path / name, MIB, "-b", "mid", "-F", "qcow2") for name in ("here", "there")
    )
    qemu_io(base, "write -P 8 0 1M")
    before = mid.read_bytes(), base.read_bytes()
    with daemon(socket_directory, "d", there):

        async def scenario() -> None:
            graph = BlockGraph()
            node = await graph.open_image(str(here), {"driver": "qcow2"})
            _, middle, bottom = layers(node)
            await drop_intermediate(graph, middle, bottom)
            await graph.close_all()

        asyncio.run(scenario())
        with Client.connect(socket_directory / "d-there.sock") as client:
            assert client.read(0, 4096) == b"\x08" * 4096
    assert (mid.read_bytes(), base.read_bytes()) == before
    assert contents(here, tmp_path) == contents(there, tmp_path) == b"\x08" * MIB
    assert "backing file: base" in qemu_img("info", here)
    assert "backing file: mid" in qemu_img("info", there)
