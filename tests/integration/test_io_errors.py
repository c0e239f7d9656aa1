"""A disk that fails, with `werror=report`: the request fails with IOERR, is logged once per kind with a count at the
end, and nothing else.

Real failures of the kernel, without tricks in between: files that are cut behind the daemon's back, file systems that
are full or turn read-only, block devices whose own storage is gone. Where it must be one certain call that fails,
strace makes it fail.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from tests.probes import Trace, loop_device, mounted
from vhostblk.client.client import Client
from vhostblk.errors import BlockError, PeerError
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.requirements import require

SIZE = 4 << 20
MIB = 1 << 20
OPTIONS = {"native": "", "threads": ",aio=threads", "python": ""}


class Served:
    """A daemon with the disk that is going to fail and one that is not, on one iothread."""

    def __init__(self, process: DaemonProcess, folder: Path) -> None:
        self.process = process
        self._folder = folder
        self._last_words: str | None = None

    def connect(self, name: str = "bad") -> Client:
        return Client.connect(self._folder / name)

    def said(self, kind: str) -> list[str]:
        """Lines of the log about this."""
        said = self.process.output if self._last_words is None else self._last_words
        return [line for line in said.splitlines() if kind in line]

    def stop(self) -> None:
        """Stop it: whoever does must learn of data that did not reach the disk."""
        self.process.stop()
        is_lost = "flush at close failed" in self.process.output
        self._last_words = self.process.expect_end(1 if is_lost else 0)
        if is_lost:
            lost = "vhostblk: what was written last may be lost: a flush failed (EIO)\n"
            assert self._last_words.endswith(lost)

    def check(self, *kinds: str, besides: str = "flush at close failed") -> None:
        """The rest of the daemon is well, and its log is short; then stop it.

        Args:
            kinds: what has failed, as the log calls it: each several times.
            besides: what may be in the log, too.
        """
        with self.connect("good") as client:
            client.write(0, b"g" * 4096)
            client.flush()
            assert client.read(0, 4096) == b"g" * 4096
        for kind in kinds:
            (line,) = self.said(kind)
            assert "WARNING: export bad: " in line
            assert line.endswith("(logged once, counted from now on)")
        self.stop()
        for kind in kinds:
            _, line = self.said(kind)
            assert line.endswith(" times in all")
        warnings = self.said("WARNING") + self.said("ERROR")
        allowed = (*kinds, besides)
        known = [line for line in warnings if any(kind in line for kind in allowed)]
        assert warnings == known


@pytest.fixture(params=["native", "threads", "python"])
def path(request: pytest.FixtureRequest) -> str:
    return str(request.param)


Serve = Callable[..., Served]


@pytest.fixture
def stack(_nothing_leaks: None) -> Iterator[ExitStack]:
    """For what must outlive the daemon: `serve` comes after it, and so ends before it."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def serve(
    stack: ExitStack, storage_daemon: DaemonStarter, socket_directory: Path, path: str
) -> Serve:
    """Starts a daemon on a file with some more options of the node."""

    def start(
        filename: Path | str,
        options: str = "",
        *,
        export: str = "",
        command: list[str] | None = None,
    ) -> Served:
        words = ["--data-path", "python" if path == "python" else "native"]
        words += ["--object", "iothread,id=io"]
        node = f"file,node-name=bad,filename={filename},discard=unmap{OPTIONS[path]}{options}"
        for blockdev in (node, "memory,node-name=good,size=1M"):
            words += ["--blockdev", blockdev]
        for name, more in (("bad", export), ("good", "")):
            words += [
                "--export",
                f"vhost-user-blk,id={name},node-name={name},addr.type=unix,"
                f"addr.path={socket_directory / name},writable=on,werror=report,iothread=io{more}",
            ]
        process = storage_daemon(
            *words,
            sockets=[socket_directory / "bad", socket_directory / "good"],
            command=command,
        )
        return Served(process, socket_directory)

    return start


def fails(action: Callable[[], object], times: int = 3) -> None:
    """It fails with IOERR, every time."""
    for _ in range(times):
        with pytest.raises(BlockError, match="status 1"):
            action()


def make_image(folder: Path, size: int = SIZE) -> Path:
    image = folder / "disk.img"
    image.write_bytes(b"d" * size)
    return image


# ---------------------------------------------------------------- files that shrink


@pytest.fixture(params=["page cache", "O_DIRECT", "tmpfs"])
def shrinking(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> tuple[Path, str]:
    """(an image, options to open it with)."""
    folder = tmp_path
    if request.param == "tmpfs":
        folder = stack.enter_context(
            mounted("none", tmp_path / "mnt", "-t", "tmpfs", "-o", "size=8m")
        )
    image = make_image(folder)
    return image, ",cache.direct=on" if request.param == "O_DIRECT" else ""


def test_file_that_shrinks_fails_reads_behind_its_end(
    shrinking: tuple[Path, str], serve: Serve
) -> None:
    image, options = shrinking
    served = serve(image, options)
    with served.connect() as client:
        assert client.read(SIZE - 4096, 4096) == b"d" * 4096
        os.truncate(image, MIB)
        fails(lambda: client.read(SIZE - 4096, 4096))
        fails(lambda: client.read(MIB - 4096, 8192))  # begins in the file
        assert client.read(MIB - 4096, 4096) == b"d" * 4096
        # Whoever writes there makes it a part of the file again.
        client.write(2 * MIB, b"w" * 4096)
        assert client.read(2 * MIB, 4096) == b"w" * 4096
        assert client.read(MIB, 4096) == bytes(4096)
        fails(lambda: client.read(SIZE - 4096, 4096))
        client.flush()
    with served.connect() as client:
        fails(lambda: client.read(SIZE - 4096, 4096))
    served.check("read failed: ")


def test_file_that_is_cut_within_a_sector_fails_that_sector(tmp_path: Path, serve: Serve) -> None:
    image = make_image(tmp_path)
    served = serve(image)
    with served.connect() as client:
        assert client.read(MIB, 512) == b"d" * 512
        os.truncate(image, MIB + 100)
        fails(lambda: client.read(MIB, 512))
        assert client.read(MIB - 512, 512) == b"d" * 512
    served.check("read failed: ")


# ---------------------------------------------------------------- full file systems


@pytest.fixture(params=["tmpfs", "ext4"])
def small(request: pytest.FixtureRequest, tmp_path: Path, stack: ExitStack) -> Path:
    """A file system of a few MiB with a sparse image on it."""
    if request.param == "tmpfs":
        options = ["-t", "tmpfs", "-o", "size=2m"]
        folder = stack.enter_context(mounted("none", tmp_path / "mnt", *options))
    else:
        fs = tmp_path / "fs.img"
        with fs.open("wb") as file:
            file.truncate(4 * MIB)
        subprocess.run([require("mkfs.ext4"), "-q", "-O", "^has_journal", str(fs)], check=True)
        folder = stack.enter_context(mounted(str(fs), tmp_path / "mnt", "-o", "loop"))
    with (folder / "disk.img").open("wb") as file:
        file.truncate(8 * MIB)
    return folder


def test_full_file_system_fails_writes_and_recovers(small: Path, serve: Serve) -> None:
    (small / "other").write_bytes(bytes(MIB))
    served = serve(small / "disk.img")
    with served.connect() as client:
        client.write(0, b"w" * 4096)
        written = 0

        def fill() -> None:
            nonlocal written
            for offset in range(0, 8 * MIB, 65536):
                client.write(offset, b"w" * 65536)
                written = offset + 65536

        fails(fill)
        assert 0 < written < 8 * MIB
        # What there is room for is still served, and nothing else has changed.
        assert client.read(0, written) == b"w" * written
        client.write(0, b"x" * 4096)
        client.flush()
        assert client.read(0, 4096) == b"x" * 4096
        fails(lambda: client.write(6 * MIB, b"w" * MIB))
        (small / "other").unlink()
        client.write(6 * MIB, b"r" * 65536)
        assert client.read(6 * MIB, 65536) == b"r" * 65536
        client.flush()
    served.check("write failed: No space left on device (ENOSPC)")


def test_full_file_system_with_o_direct(tmp_path: Path, stack: ExitStack, serve: Serve) -> None:
    fs = tmp_path / "fs.img"
    with fs.open("wb") as file:
        file.truncate(4 * MIB)
    subprocess.run([require("mkfs.ext4"), "-q", "-O", "^has_journal", str(fs)], check=True)
    folder = stack.enter_context(mounted(str(fs), tmp_path / "mnt", "-o", "loop"))
    with (folder / "disk.img").open("wb") as file:
        file.truncate(8 * MIB)
    served = serve(folder / "disk.img", ",cache.direct=on")
    with served.connect() as client:
        client.write(0, b"w" * MIB)

        def fill() -> None:
            for offset in range(MIB, 8 * MIB, MIB):
                client.write(offset, b"w" * MIB)

        fails(fill)
        fails(lambda: client.write_zeroes((7 * MIB, MIB)), 2)
        assert client.read(0, MIB) == b"w" * MIB
        client.flush()
    served.check(
        "write failed: No space left on device (ENOSPC)",
        "write_zeroes failed: No space left on device (ENOSPC)",
    )


# ---------------------------------------------------------------- a file system that turns read-only


def test_file_system_that_turns_read_only_fails_writes(
    tmp_path: Path, stack: ExitStack, serve: Serve
) -> None:
    fs = tmp_path / "fs.img"
    with fs.open("wb") as file:
        file.truncate(16 * MIB)
    subprocess.run([require("mkfs.ext4"), "-q", str(fs)], check=True)
    options = ["-o", "loop,errors=remount-ro"]
    folder = stack.enter_context(mounted(str(fs), tmp_path / "mnt", *options))
    served = serve(make_image(folder, MIB))
    with served.connect() as client:
        client.write(0, b"w" * 4096)
        client.flush()
        # What ext4 does when it finds an error of its own.
        subprocess.run(["mount", "-o", "remount,abort", str(folder)], check=True)
        fails(lambda: client.write(4096, b"x" * 4096))
        fails(lambda: client.write_zeroes((8192, 4096)))
        fails(lambda: client.discard((8192, 4096)))
        fails(client.flush)
        assert client.read(0, 8192) == b"w" * 4096 + b"d" * 4096
    served.check(*(f"{name} failed: " for name in ("write", "write_zeroes", "discard", "flush")))


# ---------------------------------------------------------------- devices


def test_device_whose_storage_is_gone_fails_reads(
    tmp_path: Path, stack: ExitStack, serve: Serve
) -> None:
    image = make_image(tmp_path)
    device = stack.enter_context(loop_device(image))
    served = serve(device.path, ",cache.direct=on")
    with served.connect() as client:
        assert client.read(SIZE - 4096, 4096) == b"d" * 4096
        os.truncate(image, MIB)
        fails(lambda: client.read(SIZE - 4096, 4096))
        assert client.read(0, 4096) == b"d" * 4096
    served.check("read failed: Input/output error (EIO)")


def test_device_that_turns_read_only_fails_writes(
    tmp_path: Path, stack: ExitStack, serve: Serve
) -> None:
    device = stack.enter_context(loop_device(make_image(tmp_path)))
    served = serve(device.path, ",cache.direct=on")
    with served.connect() as client:
        client.write(0, b"w" * 4096)
        subprocess.run([require("blockdev"), "--setro", device.path], check=True)
        # It would stay read-only for its next user.
        stack.callback(subprocess.run, ["blockdev", "--setrw", device.path], check=True)
        fails(lambda: client.write(0, b"x" * 4096))
        assert client.read(0, 4096) == b"w" * 4096
    served.check("write failed: ")


@pytest.fixture
def full_device(tmp_path: Path, stack: ExitStack) -> str:
    """A device that takes writes into the page cache, and cannot keep them: its storage is full."""
    folder = stack.enter_context(mounted("none", tmp_path / "mnt", "-t", "tmpfs", "-o", "size=1m"))
    image = folder / "disk.img"
    with image.open("wb") as file:
        file.truncate(SIZE)
    return stack.enter_context(loop_device(image)).path


def test_flush_that_failed_once_never_succeeds_again(full_device: str, serve: Serve) -> None:
    """The kernel tells of lost pages once, and drops them: the next fdatasync says that all is well."""
    served = serve(full_device)
    with served.connect() as client:
        client.write(0, b"w" * 4096)
        client.flush()
        client.write(MIB, b"w" * 2 * MIB)  # twice the room there is
        fails(client.flush, 5)
        client.write(0, b"x" * 4096)
        fails(client.flush)
        assert client.read(0, 4096) == b"x" * 4096
        # Nor does the guest get rid of it in another way.
        with pytest.raises(PeerError):
            client.set_writeback(False)
    with served.connect() as client:
        fails(client.flush)
    assert len(served.said("refused SET_CONFIG")) == 1
    lost = "an earlier flush has lost data already"
    served.check("flush failed: ", besides=lost)
    assert any("flush at close failed" in line for line in served.said(lost))
    assert served.said("what was written last may be lost")


def test_flush_that_failed_fails_on_every_queue(full_device: str, serve: Serve) -> None:
    served = serve(full_device)
    with Client.connect(served._folder / "bad", queues=4) as client:
        client.write(MIB, b"w" * 2 * MIB, queue=2)
        pending = [client.submit(4, queue=queue) for queue in (0, 1, 2, 3) for _ in range(4)]
        client.wait(pending)
        # A flush that ended before the failure came to light may have succeeded; none may afterwards.
        assert any(p.status == 1 for p in pending)
        for queue in (3, 2, 1, 0):
            fails(partial(client.flush, queue=queue))
    served.check("flush failed: ")


def test_durable_write_to_a_full_device_fails(full_device: str, serve: Serve) -> None:
    served = serve(full_device, export=",writethrough=on")
    with served.connect() as client:
        client.write(0, b"w" * 4096)
        fails(lambda: client.write(MIB, b"w" * 2 * MIB))
        with served.connect("good") as good:
            good.write(0, b"g" * 512)
    served.check("write failed: ")


# ---------------------------------------------------------------- one certain call


@pytest.mark.parametrize("path", ["threads", "python"], indirect=True)
def test_one_failing_fdatasync_is_remembered(tmp_path: Path, serve: Serve, path: str) -> None:
    """All later ones would succeed."""
    failing = "fdatasync:error=EIO:when=1"
    trace = Trace(tmp_path / "trace", "fdatasync", inject=failing, io_uring=False)
    served = serve(make_image(tmp_path), command=[*trace.command, *VHOSTBLK, "storage-daemon"])
    with served.connect() as client:
        client.write(0, b"w" * 4096)
        fails(client.flush, 4)
        client.write(0, b"w" * 4096)
        fails(client.flush, 4)
    served.check("flush failed: Input/output error (EIO)")


@pytest.mark.parametrize("path", ["threads", "python"], indirect=True)
def test_without_a_page_cache_a_failed_flush_may_succeed_later(
    tmp_path: Path, serve: Serve, path: str
) -> None:
    failing = "fdatasync:error=EIO:when=1+2"  # every second call of a thread
    trace = Trace(tmp_path / "trace", "fdatasync", inject=failing, io_uring=False)
    image = make_image(tmp_path)
    served = serve(image, ",cache.direct=on", command=[*trace.command, *VHOSTBLK, "storage-daemon"])
    with served.connect() as client:
        outcomes = set()
        for _ in range(40):
            client.write(0, b"w" * 4096)
            try:
                client.flush()
                outcomes.add("done")
            except BlockError:
                outcomes.add("failed")
    assert outcomes == {"done", "failed"}


# ---------------------------------------------------------------- alignment


@pytest.mark.parametrize("logical", [512, 4096])
def test_o_direct_serves_requests_that_do_not_fit_the_device(
    tmp_path: Path, stack: ExitStack, serve: Serve, logical: int
) -> None:
    """Sectors of 512 bytes, from memory that is aligned to 16."""
    image = make_image(tmp_path)
    device = stack.enter_context(loop_device(image, "--sector-size", str(logical)))
    served = serve(device.path, ",cache.direct=on")
    model = bytearray(image.read_bytes())
    with Client.connect(served._folder / "bad", alignment=16) as client:
        for index, (offset, length) in enumerate([(0, 512), (512, 1024), (4096 - 512, 1024)]):
            content = bytes([index + 1]) * length
            client.write(offset, content)
            model[offset : offset + length] = content
            assert client.read(offset, length) == content
        client.write_zeroes((512, 512))
        model[512:1024] = bytes(512)
        assert client.read(0, 8192) == model[:8192]
        client.flush()
    assert served.process.stop() == 0
    assert image.read_bytes() == model
