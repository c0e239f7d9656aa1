"""What a guest was told is safe is on the disk: its fsync goes all the way down, and without a cache every write does.

An fdatasync that is asked for through io_uring is no system call, so it is looked for where it arrives: a block device
counts the flushes that it gets. With the thread pool instead of io_uring strace shows the call itself, and its place
among the writes.
"""

from __future__ import annotations

import re
from pathlib import Path

from tests.probes import Trace, loop_device
from tests.qemu.images import fresh_image
from tests.requirements import require
from vhostblk.testing.daemon_process import VHOSTBLK
from vhostblk.testing.guest import Guest, GuestDisk
from vhostblk.testing.plugin import DaemonStarter

SIZE = 16 << 20
WRITES = {"pwrite64", "pwritev", "pwritev2"}
WRITE = "dd if=/dev/urandom of=/dev/vda bs=4k count=8 conv=notrunc seek={} oflag=direct 2>/dev/null"
FSYNC = "dd if=/dev/null of=/dev/vda conv=notrunc,fsync 2>/dev/null"


def test_fsync_of_a_guest_flushes_the_device_below_with_default_options(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    require("qemu")
    socket = socket_directory / "disk"
    with loop_device(fresh_image(tmp_path / "below.img", SIZE)) as below:
        served = daemon("serve", below.path, "--socket", socket, sockets=[socket])
        with Guest([GuestDisk(socket)], programs=()) as guest:
            assert guest.check("cat /sys/block/vda/queue/write_cache").strip() == "write back"
            for place in (0, 8):
                before = below.flushes
                guest.check(WRITE.format(place))
                assert below.flushes == before  # it is the fsync that is seen below, not the write
                guest.check(FSYNC)
                assert below.flushes > before
            guest.power_off()
        assert served.stop() == 0


def test_fsync_becomes_fdatasync_and_without_a_cache_every_write_is_durable(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path
) -> None:
    require("qemu")
    image, socket = fresh_image(tmp_path / "disk.img", SIZE), socket_directory / "disk"
    trace = Trace(tmp_path / "trace", *WRITES, "fdatasync", "fsync", "io_uring_enter")
    daemon(
        *("serve", image, "--socket", socket, "--aio", "threads"),
        command=[*trace.command, *VHOSTBLK],
        sockets=[socket],
    )

    def calls(lines: list[str]) -> list[str]:
        names = (re.match(r"\d+ +(?:<\.\.\. )?(\w+)", line) for line in lines)
        return [match[1] for match in names if match]

    with Guest([GuestDisk(socket)], programs=()) as guest:

        def during(command: str) -> list[str]:
            trace.new()
            guest.check(command)
            return calls(trace.new())

        written = during(WRITE.format(0))
        assert len(written) == 8
        assert set(written) <= WRITES

        synced = during(f"{WRITE.format(8)} && {FSYNC}")
        assert set(synced[:8]) <= WRITES
        assert synced[8:] == ["fdatasync"]

        # The guest gives its cache up: what it wrote before becomes durable at once ...
        guest.check(WRITE.format(16))
        assert during("echo 'write through' >/sys/block/vda/cache_type") == ["fdatasync"]
        assert guest.check("cat /sys/block/vda/queue/write_cache").strip() == "write through"
        # ... and what it writes from now on when it is written. Not with RWF_DSYNC: through the page cache that could
        # take the error of a write that was lost.
        durable = during(f"{WRITE.format(24)} && {FSYNC}")
        assert durable[1::2] == ["fdatasync"] * 8
        assert set(durable[::2]) <= WRITES
        assert len(durable) == 16

        guest.check("echo 'write back' >/sys/block/vda/cache_type")
        assert during(f"{WRITE.format(32)} && {FSYNC}")[8:] == ["fdatasync"]
        guest.power_off()
