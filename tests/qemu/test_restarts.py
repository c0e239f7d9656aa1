"""A guest that works on while its daemon ends again and again: no error, no wrong byte, no hang.

The load (guest_load.c) knows what every block must contain. In the suite a daemon ends a few times;
VHOSTBLK_HUNT=N: N times as often (`make verify`).
"""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.daemons import eventually
from tests.requirements import require
from tests.restarts import ForkServer
from tests.schedule import HUNT
from vhostblk.testing.daemon_process import is_listening
from vhostblk.testing.guest import Guest, GuestDisk

ENDS = 3  # of both kinds
SIZE = 64 << 20
# A guest takes its time to boot: the others are for longer runs.
CASES = [("qcow2", 4, "split"), ("raw", 1, "packed")]
if HUNT > 1:
    CASES = list(itertools.product(("raw", "qcow2"), (1, 4), ("split", "packed")))
_PROGRESS = 5  # requests of the slowest worker between two ends
_SECONDS = 120.0  # for that


@pytest.fixture(scope="module")
def load_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """guest_load.c, for any guest."""
    require("qemu", "qemu-img")
    source = Path(__file__).with_name("guest_load.c")
    program = tmp_path_factory.mktemp("load") / "guest_load"
    compiler = require("gcc", group="compiler")
    options = ("-O1", "-Wall", "-Wextra", "-Werror", "-static")
    subprocess.run([compiler, *options, "-o", program, source], check=True, timeout=60)
    return program


class BusyGuest:
    """A guest with the load running."""

    def __init__(self, guest: Guest, workers: int, rings: str | None = None) -> None:
        self.guest = guest
        if rings is not None:
            feature = guest.check("cut -c35 /sys/block/vda/device/features")  # VIRTIO_F_RING_PACKED
            assert feature.strip() == str(int(rings == "packed"))
        # In the background: the shell is wanted for other things.
        guest.check(
            f"(guest_load /dev/vda {workers} /tmp/stop /tmp/progress >/tmp/load 2>&1;"
            " echo $? >/tmp/status) >/dev/null 2>&1 &"
        )
        self.goes_on()

    def goes_on(self) -> None:
        """Returns when every worker has done some more."""
        self.guest.check(
            "while [ ! -e /tmp/progress ]; do usleep 10000; done; before=$(cat /tmp/progress);"
            f" until [ $(cat /tmp/progress) -ge $((before + {_PROGRESS})) ]; do"
            " if [ -e /tmp/status ]; then cat /tmp/load; exit 1; fi; usleep 10000; done",
            _SECONDS,
        )

    def finish(self) -> int:
        """End the load: every byte is right, and the kernel has seen no error.

        Returns:
            requests of the slowest worker.
        """
        requests = int(self.guest.check("cat /tmp/progress; touch /tmp/stop"))
        status = self.guest.check(
            "until [ -e /tmp/status ]; do usleep 10000; done; cat /tmp/load /tmp/status", _SECONDS
        )
        assert status == "0\n", self.guest.console
        complaints = self.guest.run("dmesg | grep -iE 'i/o error|not a head|hung task'")
        assert complaints.output == ""
        self.guest.power_off()
        return requests


@contextmanager
def busy_guest(
    words: list[str], path: Path, load: Path, queues: int, rings: str
) -> Iterator[tuple[ForkServer, BusyGuest]]:
    with ForkServer([*words, "--socket", path]) as server:
        eventually(lambda: is_listening(path), "the first daemon listens", 30)
        disk = GuestDisk(path, queues=queues, reconnect_seconds=1, options=ring_options(rings))
        with Guest([disk], cpus=queues, programs=(str(load),)) as guest:
            yield server, BusyGuest(guest, 4 * queues, rings)


def ring_options(rings: str) -> dict[str, str]:
    """Of QEMU's device."""
    return {"packed": "on" if rings == "packed" else "off"}


def serve(image: Path, image_format: str) -> list[str]:
    """A fresh image, and what serves it."""
    command = ["qemu-img", "create", "-qf", image_format, os.fspath(image), str(SIZE)]
    subprocess.run(command, check=True, timeout=30)
    words = ["--log-level", "warning", "serve", os.fspath(image), "--format", image_format]
    return [*words, "--lock-timeout", "60"]


@pytest.mark.timeout(300 + 60 * ENDS * HUNT)
@pytest.mark.parametrize(("image_format", "queues", "rings"), CASES)
def test_guest_notices_nothing_of_daemons_that_are_killed_and_of_some_that_are_stopped(
    socket_directory: Path,
    tmp_path: Path,
    load_program: Path,
    image_format: str,
    queues: int,
    rings: str,
) -> None:
    words = serve(tmp_path / "disk.img", image_format)
    path = socket_directory / "s"
    with busy_guest(words, path, load_program, queues, rings) as (server, guest):
        for _ in range(ENDS * HUNT):
            server.kill()
            server.start()
            guest.goes_on()
            assert server.stop() == 0, server.output
            server.start()
            guest.goes_on()
        requests = guest.finish()
    ends = f"{ENDS * HUNT} of both, {requests} requests a worker"
    print(f"{image_format}, {queues} queues, {rings} rings: {ends}")
