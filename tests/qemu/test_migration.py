"""A guest that works on while it moves between two QEMUs, each with a daemon of its own on the same image.

The load (guest_load.c) knows what every block must contain, and what the device has put into memory that nobody else
writes to: so blocks that the other daemon does not have, and pages that were written and not copied, are both found. In
the suite the guest moves a few times; VHOSTBLK_HUNT=N: N times as often (`make verify`).
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.test_restarts import BusyGuest, load_program, ring_options, serve
from tests.schedule import HUNT
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.guest import Guest, GuestDisk
from vhostblk.testing.plugin import DaemonStarter

__all__ = ["load_program"]

MOVES = 2
_SECONDS = 180.0
CASES = [("qcow2", 2, "split")]
if HUNT > 1:
    CASES += [("raw", 1, "split"), ("raw", 2, "packed"), ("qcow2", 2, "packed")]


class Monitor:
    """QEMU's monitor (QMP)."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(_SECONDS)
        deadline = time.monotonic() + 30
        while True:
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                assert time.monotonic() < deadline
                time.sleep(0.01)
        self._lines = self._socket.makefile("r")
        self._lines.readline()  # the greeting
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: Any) -> Any:
        """Run a command."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode())
        while True:
            line = self._lines.readline()
            assert line, "QEMU has ended"
            if "event" not in (answer := json.loads(line)):
                break
        assert "return" in answer, answer
        return answer["return"]

    def wait(self, command: str, status: str) -> None:
        """Ask until that is the status."""
        deadline = time.monotonic() + _SECONDS
        while (now := self.status(command)) != status:
            assert now != "failed", command
            assert time.monotonic() < deadline, now
            time.sleep(0.02)

    def status(self, command: str) -> str:
        """What the answer to a question says that it is."""
        return str(self.ask(command)["status"])

    def close(self) -> None:
        self._lines.close()
        self._socket.close()


class Host:
    """A QEMU, which its guest comes to and leaves."""

    def __init__(
        self,
        folder: Path,
        name: str,
        daemon: DaemonProcess,
        load: Path,
        queues: int,
        rings: str,
    ) -> None:
        self._folder = folder
        self._daemon = daemon
        self._name = name
        self._disk = GuestDisk(daemon.sockets[0], queues=queues, options=ring_options(rings))
        self._load = load
        self._queues = queues
        self.uri = f"unix:{folder / name}.migration"

    def run(self, stack: ExitStack, *, incoming: bool) -> Guest:
        """Start it: with a guest of its own, or for one that is to come."""
        path = self._folder / f"{self._name}.qmp"
        path.unlink(missing_ok=True)
        guest = stack.enter_context(
            Guest(
                [self._disk],
                cpus=self._queues,
                memory_mib=192,
                programs=(str(self._load),),
                extra_arguments=["-qmp", f"unix:{path},server=on,wait=off"],
                incoming=self.uri if incoming else None,
            )
        )
        self.monitor = Monitor(path)
        stack.callback(self.monitor.close)
        return guest

    def send(self, other: Host) -> None:
        """Have the guest go on in the other one."""
        # However busy it is: the rest is copied while its processors stand. A slow migration is no harder on us, but on
        # guests under TCG: QEMU 7.2 then loses pages at times that their processors, and no device, have written last.
        self.monitor.ask(
            "migrate-set-parameters", **{"downtime-limit": 2000, "max-bandwidth": 1 << 30}
        )
        self.monitor.ask("migrate", uri=other.uri)
        self.monitor.wait("query-migrate", "completed")
        other.monitor.wait("query-status", "running")


@pytest.mark.timeout(400 + 60 * MOVES * HUNT)
@pytest.mark.parametrize(("image_format", "queues", "rings"), CASES)
def test_busy_guest_moves_back_and_forth_between_two_daemons_and_every_byte_is_right(
    daemon: DaemonStarter,
    socket_directory: Path,
    tmp_path: Path,
    load_program: Path,
    image_format: str,
    queues: int,
    rings: str,
) -> None:
    words = [*serve(tmp_path / "disk.img", image_format)[2:], "--allow-inactive"]
    daemons = []
    hosts = []
    for name in ("a", "b"):
        path = socket_directory / name
        daemons.append(daemon(*words, "--socket", path, sockets=[path]))
        hosts.append(Host(socket_directory, name, daemons[-1], load_program, queues, rings))
    stacks = [ExitStack(), ExitStack()]
    with stacks[0], stacks[1]:
        guest = BusyGuest(hosts[0].run(stacks[0], incoming=False), 4 * queues, rings)
        for move in range(MOVES * HUNT):
            here, there = move % 2, 1 - move % 2
            arrives = hosts[there].run(stacks[there], incoming=True)
            hosts[here].send(hosts[there])
            guest.guest = arrives
            stacks[here].close()  # QEMU ends, and with it what it had of the memory
            guest.goes_on()
        requests = guest.finish()
    for process in daemons:
        assert process.stop() == 0
        assert "its image is taken back" in process.output
        assert "its image is given up" in process.output
    moves = f"{MOVES * HUNT} moves, {requests} requests a worker"
    print(f"{image_format}, {queues} queues, {rings} rings: {moves}")
