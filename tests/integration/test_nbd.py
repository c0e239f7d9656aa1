"""The NBD client against servers that others have written: nbdkit with its plugins and filters, and qemu-nbd."""

from __future__ import annotations

import asyncio
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemons import eventually
from tests.disks import read, with_disk
from vhostblk.block.backend import BlockBackend
from vhostblk.block.flags import Req, StatusFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.status import block_status
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.daemon_process import is_listening
from vhostblk.testing.requirements import require

SIZE = 1 << 20
DEADLINE = 60
FUA = int(Req.FUA)


@pytest.fixture
def folder() -> Iterator[Path]:
    """Of a short name, because sockets are in it."""
    with tempfile.TemporaryDirectory(prefix="vb-nbd-") as name:
        yield Path(name)


@contextmanager
def server(folder: Path, *command: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that listens at `s` in the folder before anybody sees it."""
    socket = folder / "s"
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    try:
        eventually(lambda: is_listening(socket) or process.poll() is not None, "a server", DEADLINE)
        assert process.poll() is None
        yield process
    finally:
        process.terminate()
        process.wait(DEADLINE)
        socket.unlink(missing_ok=True)


def nbdkit(folder: Path, *arguments: str) -> list[str]:
    return [
        require("nbdkit"),
        "--foreground",
        "--exit-with-parent",
        "-U",
        f"{folder}/s",
        *arguments,
    ]


def qemu_nbd(folder: Path, *arguments: str) -> list[str]:
    return [require("qemu-nbd"), "-t", "-k", f"{folder}/s", *arguments]


def options(folder: Path, *more: str) -> str:
    return ",".join(["nbd", "discard=unmap", "server.type=unix", f"server.path={folder}/s", *more])


async def everything(backend: BlockBackend) -> None:
    """Each operation, and what must be seen of it."""
    content = bytes(range(1, 252)) * 3000
    await backend.pwritev(0, IoVec.of(content[:1000], content[1000:]))
    await backend.pwritev(4097, IoVec.of(b"durable"), FUA)
    await backend.pwrite_zeroes(65536, 65536, True)
    await backend.pwrite_zeroes(200_000, 1000, False, FUA)
    await backend.pdiscard(300_032, 4096)
    await backend.flush()
    expected = bytearray(content)
    expected[4097:4104] = b"durable"
    expected[65536:131_072] = bytes(65536)
    expected[200_000:201_000] = bytes(1000)
    got = await read(backend, 0, len(content))
    assert got[:300_032] == expected[:300_032]
    assert got[304_128:] == expected[304_128:]
    many = await asyncio.gather(*(read(backend, 512 * one, 512) for one in range(64)))
    assert b"".join(many) == expected[: 64 * 512]


@pytest.mark.parametrize(
    "arguments",
    [
        ("memory", str(SIZE)),
        ("--filter=delay", "memory", str(SIZE), "rdelay=1ms", "wdelay=2ms"),
        ("--no-sr", "memory", str(SIZE)),
        ("--mask-handshake=0", "memory", str(SIZE)),
        (
            *("--filter=blocksize-policy", "memory", str(SIZE), "blocksize-minimum=4096"),
            *("blocksize-preferred=4096", "blocksize-maximum=64K", "blocksize-error-policy=error"),
        ),
        ("--filter=nozero", "memory", str(SIZE), "zeromode=none"),
    ],
    ids=["memory", "delay", "simple-replies", "not-fixed", "blocks", "little"],
)
def test_nbdkit_keeps_what_is_written(arguments: tuple[str, ...], folder: Path) -> None:
    with server(folder, *nbdkit(folder, *arguments)):
        with_disk(lambda graph: graph.add(options(folder)), everything)


@pytest.mark.parametrize("served", ["nbdkit", "qemu-nbd"])
def test_file_that_is_served_has_what_was_written(served: str, folder: Path) -> None:
    image = folder / "disk"
    image.write_bytes(bytes(SIZE + 100))  # the end is no sector
    if served == "nbdkit":
        command = nbdkit(folder, "file", str(image))
    else:
        command = qemu_nbd(folder, "-f", "raw", "-x", "x y", "--discard=unmap", str(image))

    async def scenario(backend: BlockBackend) -> None:
        assert SIZE + 100 <= backend.length <= SIZE + 512
        await everything(backend)
        await backend.pwritev(SIZE, IoVec.of(b"end"))
        assert await read(backend, SIZE - 1, 5) == b"\0end\0"
        await backend.pwrite_zeroes(1 << 19, 1 << 19, True)
        status = await block_status(backend.node, (1 << 19) + 65536, 65536)
        assert status.flags & StatusFlag.ZERO

    with server(folder, *command):
        name = "" if served == "nbdkit" else "x y"
        with_disk(lambda graph: graph.add(options(folder, f"export={name}")), scenario)
    content = image.read_bytes()
    assert (content[4097:4104], content[SIZE : SIZE + 3]) == (b"durable", b"end")
    assert len(content) >= SIZE + 100


def test_error_of_the_error_filter_is_one_requests(folder: Path) -> None:
    arguments = ("--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC")
    broken = folder / "broken"
    more = ("error-pwrite-rate=100%", f"error-pwrite-file={broken}")

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(b"good"))
        broken.touch()
        with pytest.raises(BlockError, match="No space left"):
            await backend.pwritev(0, IoVec.of(b"none"))
        broken.unlink()
        assert await read(backend, 0, 4) == b"good"
        await backend.pwritev(0, IoVec.of(b"more"))

    with server(folder, *nbdkit(folder, *arguments, *more)):
        with_disk(lambda graph: graph.add(options(folder)), scenario)


def test_export_that_is_not_there_is_refused(folder: Path) -> None:
    async def never(backend: BlockBackend) -> None:
        raise AssertionError

    with (
        server(folder, *qemu_nbd(folder, "-f", "raw", "-x", "there", "null-co://")),
        pytest.raises(ConfigError, match="Requested export not available"),
    ):
        with_disk(lambda graph: graph.add(options(folder, "export=elsewhere")), never)


def test_server_that_is_killed_and_started_again_is_waited_for(folder: Path) -> None:
    image = folder / "disk"
    image.write_bytes(bytes(SIZE))
    command = nbdkit(folder, "--filter=delay", "file", str(image), "wdelay=300ms")

    async def use(first: subprocess.Popen[bytes]) -> None:
        graph = BlockGraph()
        node = await graph.add(options(folder, "reconnect-delay=60"))
        backend = BlockBackend(node, "the test", writable=True)
        await backend.pwritev(0, IoVec.of(b"before"))
        waits = asyncio.ensure_future(backend.pwritev(4096, IoVec.of(b"meanwhile")))
        await asyncio.sleep(0)
        first.kill()
        first.wait()
        os.unlink(folder / "s")
        with server(folder, *command):
            await waits
            assert await read(backend, 0, 6) == b"before"
            await backend.close()
            await graph.close_all()

    with server(folder, *command) as first:
        asyncio.run(use(first))
    assert image.read_bytes()[4096:4105] == b"meanwhile"
