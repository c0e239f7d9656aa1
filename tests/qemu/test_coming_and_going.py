"""Daemons and guests that come and go: nobody else notices more than a pause, and nothing that was flushed is lost.

What a stopped daemon leaves is a ring without requests in flight, because an orderly stop drains; so QEMU can start it
again from there. After a crash that is not so: that needs in-flight tracking, which is not offered yet.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import pytest

from tests.qemu.images import allocated, fresh_image, pattern, same, write_pattern
from tests.requirements import require
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.guest import Guest, GuestDisk
from vhostblk.testing.plugin import DaemonStarter

MIB = 1 << 20
SIZE = 64 * MIB


@pytest.fixture(autouse=True)
def _tools() -> None:
    require("qemu", "qemu-img")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    return fresh_image(tmp_path / "disk.img", SIZE)


def said(daemon: DaemonProcess, what: str, *, count: int = 1, seconds: float = 30.0) -> None:
    """Waits until the daemon has said something, so many times."""
    deadline = time.monotonic() + seconds
    while daemon.output.count(what) < count:
        assert time.monotonic() < deadline, f"not {count} times {what!r}:\n{daemon.output}"
        assert daemon.status is None, daemon.output
        os.sched_yield()


@pytest.mark.parametrize("data_path", ["native", "python"])
def test_guest_works_on_when_its_daemon_is_stopped_and_started_again(
    daemon: DaemonStarter, socket_directory: Path, image: Path, tmp_path: Path, data_path: str
) -> None:
    if data_path == "native":
        require("engine")
    path = socket_directory / "disk"
    command = ("serve", image, "--socket", path, "--data-path", data_path)
    first = daemon(*command, sockets=[path])
    with Guest([GuestDisk(path, reconnect_seconds=1)], cpus=2, programs=()) as guest:
        guest.check(write_pattern(100_000, MIB, "/dev/vda"))
        # Idle when it stops.
        assert first.stop() == 0
        assert not path.exists()
        # What the guest asks for meanwhile waits for the next one.
        writing = guest.submit(write_pattern(200_000, MIB, "/dev/vda", offset=MIB))
        guest_is_waiting = guest.submit("cat /sys/block/vda/inflight")
        second = daemon(*command, sockets=[path])
        assert writing.result().status == 0
        assert guest_is_waiting.result().output.split() == ["0", "0"]
        # Busy when it stops: what has begun is completed, the rest is for the next one.
        guest.check(f"{write_pattern(300_000, 2 * MIB, '/tmp/busy')}; sync")
        writing = guest.submit(
            "for time in $(seq 4); do"
            " dd if=/tmp/busy of=/dev/vda bs=4k seek=1024 conv=notrunc oflag=direct 2>/dev/null ||"
            " exit 1; done"
        )
        wait_for_growth(image, 2 * MIB)
        assert second.stop() == 0
        third = daemon(*command, sockets=[path])
        assert writing.result().status == 0
        guest.check("dd if=/dev/null of=/dev/vda conv=notrunc,fsync 2>/dev/null")
        guest.check(
            "echo 3 >/proc/sys/vm/drop_caches;"
            " dd if=/dev/vda bs=1M skip=4 count=2 2>/dev/null | cmp - /tmp/busy"
        )
        guest.power_off()
        assert third.stop() == 0
    contents = pattern(100_000, MIB) + pattern(200_000, MIB) + bytes(2 * MIB)
    contents += pattern(300_000, 2 * MIB)
    reference = fresh_image(tmp_path / "reference", SIZE)
    with reference.open("r+b") as file:
        file.write(contents)
    assert same(image, reference)


def test_requests_of_a_slow_disk_are_done_once_when_its_daemon_is_stopped_under_them(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    """A daemon that hung up before it had drained made QEMU start the next one too early in the ring."""
    path = socket_directory / "disk"
    command = (
        *("--blockdev", "driver=null-co,node-name=d,size=64M,latency-ns=700000000,read-zeroes=on"),
        "--export",
        f"type=vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={path}",
    )
    first = storage_daemon(*command, sockets=[path])
    with Guest([GuestDisk(path, reconnect_seconds=1)], programs=()) as guest:
        guest.check(
            ">/tmp/ended; for place in 1 2 3 4; do"
            " (dd if=/dev/zero of=/dev/vda bs=4k seek=${place}0 count=3 conv=notrunc oflag=direct"
            " 2>/dev/null; echo $? >>/tmp/ended) >/dev/null 2>&1 & done;"
            " until grep -q '[1-9]' /sys/block/vda/inflight; do usleep 1000; done"
        )
        assert first.stop() == 0
        storage_daemon(*command, sockets=[path])
        ended = guest.check(
            "until [ $(wc -l </tmp/ended) = 4 ]; do usleep 1000; done; cat /tmp/ended"
        )
        assert ended.split() == ["0"] * 4
        assert guest.check("dmesg | grep -c 'not a head' || true").strip() == "0"
        guest.power_off()


def wait_for_growth(image: Path, size: int, seconds: float = 30.0) -> None:
    """Waits until the image takes more than `size` bytes: somebody is writing."""
    deadline = time.monotonic() + seconds
    while allocated(image) <= size:
        assert time.monotonic() < deadline, f"{allocated(image)} bytes"
        os.sched_yield()


def test_next_guest_is_served_after_power_off_and_after_a_kill_with_writes_in_flight(
    daemon: DaemonStarter, socket_directory: Path, image: Path
) -> None:
    path = socket_directory / "disk"
    served = daemon("serve", image, "--socket", path, sockets=[path])
    disks = [GuestDisk(path)]
    with Guest(disks, programs=()) as guest:
        guest.check(write_pattern(100_000, MIB, "/dev/vda"))
        guest.power_off()
    said(served, "the front-end has left", count=1)

    with Guest(disks, programs=()) as guest:
        guest.check(f"seq 100000 400000 | head -c {MIB} >/tmp/wanted")
        guest.check(f"cmp -n {MIB} /dev/vda /tmp/wanted")
        guest.check(write_pattern(200_000, MIB, "/dev/vda", offset=MIB))
        for number in range(4):
            guest.check(
                f"(while dd if=/dev/zero of=/dev/vda bs=64k seek=$((64 + {number} * 100)) count=99"
                " conv=notrunc oflag=direct; do :; done) >/dev/null 2>&1 &"
            )
        wait_for_growth(image, 2 * MIB)
        guest.kill()
    said(served, "the front-end has left", count=2)
    # With nobody connected nothing is written any more.
    before = image.stat().st_mtime_ns

    with Guest(disks, programs=()) as guest:
        assert image.stat().st_mtime_ns == before
        guest.check(f"seq 100000 400000 | head -c {MIB} >/tmp/wanted")
        guest.check(f"cmp -n {MIB} /dev/vda /tmp/wanted")
        guest.check(f"seq 200000 500000 | head -c {MIB} >/tmp/wanted")
        guest.check("dd if=/dev/vda bs=1M skip=1 count=1 2>/dev/null | cmp - /tmp/wanted")
        guest.check(write_pattern(300_000, MIB, "/dev/vda", offset=32 * MIB))
        guest.power_off()
    assert served.stop() == 0
    contents = image.read_bytes()
    assert contents[: 2 * MIB] == pattern(100_000, MIB) + pattern(200_000, MIB)
    assert contents[32 * MIB : 33 * MIB] == pattern(300_000, MIB)
    assert "broken" not in served.output


def test_storage_daemon_serves_two_disks_on_sockets_it_inherited(
    storage_daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    """As QEMU's vhost-user-blk-test.c starts it."""
    paths = [socket_directory / f"disk{number}" for number in range(2)]
    images = [fresh_image(tmp_path / path.name, SIZE) for path in paths]
    listeners = [socket.socket(socket.AF_UNIX) for _ in paths]
    words: list[str] = []
    for number, (listener, path, disk) in enumerate(zip(listeners, paths, images, strict=True)):
        listener.bind(os.fspath(path))
        listener.listen(1)
        words += ["--blockdev", f"driver=file,node-name=disk{number},filename={disk}"]
        words += [
            "--export",
            f"type=vhost-user-blk,id=disk{number},addr.type=fd,addr.str={listener.fileno()},"
            f"node-name=disk{number},writable=on,num-queues=8",
        ]
    served = storage_daemon(
        *words, pass_fds=[listener.fileno() for listener in listeners], sockets=paths
    )
    for listener in listeners:
        listener.close()
    with Guest([GuestDisk(path) for path in paths], programs=()) as guest:
        guest.check(write_pattern(1, MIB, "/dev/vda"))
        guest.check(write_pattern(2, MIB, "/dev/vdb", offset=MIB))
        guest.power_off()
    assert served.stop() == 0
    for disk, contents in zip(images, (pattern(1, MIB), bytes(MIB) + pattern(2, MIB)), strict=True):
        reference = fresh_image(tmp_path / "reference", SIZE)
        with reference.open("r+b") as file:
            file.write(contents)
        assert same(disk, reference)
