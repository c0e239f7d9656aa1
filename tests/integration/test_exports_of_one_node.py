"""Several exports of one node, as QEMU allows them: each sees what the others write, nothing is lost between them."""

from __future__ import annotations

import os
import random
import signal
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import eventually
from tests.probes import loop_device
from vhostblk.client.client import Client
from vhostblk.errors import BlockError
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.requirements import require

BOTH = pytest.mark.parametrize("path", ["native", "python"])
SIZE = 1 << 20


class Exports:
    """A daemon with the writable exports a and b and the read-only export r."""

    def __init__(
        self, storage_daemon: DaemonStarter, folder: Path, path: str, *blockdevs: str
    ) -> None:
        if path == "native":
            require("engine")
        self._folder = folder
        words = ["--data-path", path]
        for blockdev in blockdevs:
            words += ["--blockdev", blockdev]
        for name, writable in (("a", "on"), ("b", "on"), ("r", "off")):
            node = name if any(f"node-name={name}," in text for text in blockdevs) else "d"
            words += ["--export", f"vhost-user-blk,id={name},node-name={node},writable={writable}"]
            words[-1] += f",addr.type=unix,addr.path={folder / name}"
        self.process: DaemonProcess = storage_daemon(*words, sockets=[folder / n for n in "abr"])

    def connect(self, name: str, **options: Any) -> Client:
        return Client.connect(self._folder / name, **options)


@BOTH
@pytest.mark.parametrize("options", ["", ",cache.direct=on", ",aio=threads"])
def test_each_reads_what_another_has_written(
    storage_daemon: DaemonStarter, image: Path, socket_directory: Path, path: str, options: str
) -> None:
    blockdev = f"file,node-name=d,filename={image},discard=unmap{options}"
    exports = Exports(storage_daemon, socket_directory, path, blockdev)
    chance = random.Random(5)
    with (
        exports.connect("a") as first,
        exports.connect("b") as second,
        exports.connect("r") as reader,
    ):
        model = bytearray(65536)
        for _ in range(200):
            writer = chance.choice([first, second])
            offset, length = chance.randrange(0, 60) * 1024, chance.choice([512, 4096])
            data = chance.randbytes(length)
            writer.write(offset, data)
            model[offset : offset + length] = data
            if chance.random() < 0.1:
                writer.flush()
            if chance.random() < 0.1:
                writer.write_zeroes((offset, 512))
                model[offset : offset + 512] = bytes(512)
            for client in (first, second, reader):
                assert client.read(offset, length) == model[offset : offset + length]
        with pytest.raises(BlockError):
            reader.write(0, bytes(512))
        reader.flush()
        # The cache modes are each guest's own.
        first.set_writeback(False)
        first.write(0, b"1" * 512)
        second.write(512, b"2" * 512)
        second.flush()
        assert reader.read(0, 1024) == b"1" * 512 + b"2" * 512


@BOTH
def test_what_shares_a_block_of_the_device_is_not_lost(
    storage_daemon: DaemonStarter, tmp_path: Path, socket_directory: Path, path: str
) -> None:
    """A write of less than a block reads, changes and writes the block: nobody else may write there meanwhile, also by
    an extent of another export."""
    backing = tmp_path / "backing.img"
    backing.write_bytes(bytes(SIZE))
    with ExitStack() as stack:
        device = stack.enter_context(loop_device(backing, "--sector-size", "4096"))
        blockdev = f"host_device,node-name=d,filename={device.path},cache.direct=on"
        exports = Exports(storage_daemon, socket_directory, path, blockdev)
        with exports.connect("a") as small, exports.connect("b") as large:
            for turn in range(1, 100):
                block = turn % 8 * 4096
                # Sectors of the same block by one, the block behind it by the other, at the same time.
                fill = bytes([turn]) * 4096
                pending = [
                    small.submit(1, block + at, out=fill[:512]) for at in range(0, 4096, 1024)
                ]
                others = [large.submit(1, block + at, out=fill[:512]) for at in (512, 1536, 2560)]
                others.append(large.submit(1, block + 4096, out=fill))
                small.wait(pending)
                large.wait(others)
                for done in (*pending, *others):
                    done.result()
                # All but the last odd sector, which nobody has written.
                assert small.read(block, 3584) == fill[:3584]
                assert small.read(block + 4096, 4096) == fill
        exports.process.stop()


@BOTH
def test_exports_of_two_windows_of_one_file_share_it(
    storage_daemon: DaemonStarter, image: Path, socket_directory: Path, path: str
) -> None:
    exports = Exports(
        storage_daemon,
        socket_directory,
        path,
        f"file,node-name=d,filename={image}",
        "raw,node-name=a,file=d,size=32768",
        "raw,node-name=b,file=d,offset=32768",
    )
    with (
        exports.connect("a") as low,
        exports.connect("b") as high,
        exports.connect("r") as whole,
    ):
        low.write(0, b"l" * 512)
        high.write(0, b"h" * 512)
        low.flush()
        high.flush()
        assert whole.read(0, 512) == b"l" * 512
        assert whole.read(32768, 512) == b"h" * 512


def has_grown(client: Client) -> bool:
    return client.read_config().capacity == SIZE // 512


@BOTH
def test_all_hear_that_the_node_has_grown(
    storage_daemon: DaemonStarter, image: Path, socket_directory: Path, path: str
) -> None:
    exports = Exports(storage_daemon, socket_directory, path, f"file,node-name=d,filename={image}")
    with exports.connect("a") as first, exports.connect("b") as second:
        os.truncate(image, SIZE)
        os.kill(exports.process.pid, signal.SIGHUP)
        for client in (first, second):
            eventually(partial(has_grown, client), "the new size")
        first.write(SIZE - 512, b"e" * 512)
        assert second.read(SIZE - 512, 512) == b"e" * 512
