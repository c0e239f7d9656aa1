"""Guests that get more memory, and lose it again, while their disk is busy.

The load (guest_load.c) knows what every block must contain. Its buffers are where the kernel puts memory of processes
first: in what can be taken away again (ZONE_MOVABLE), that is in the memory that was added. So requests name it as
soon as it is there, and the kernel has to empty it before it lets it go.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.huge_pages import HUGE_PAGE, huge_pages
from tests.qemu.test_migration import Monitor
from tests.qemu.test_restarts import BusyGuest, load_program, serve
from tests.schedule import HUNT
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.guest import Guest, GuestDisk
from vhostblk.testing.initramfs import VIRTIO_MODULES
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.resources import Resources

__all__ = ["load_program"]

_SECONDS = 120.0
_BLOCK = 128 << 20  # the unit of Linux on x86
_HUGE_GUEST_MIB = 192


class GrowingGuest(BusyGuest):
    """A guest whose memory is changed, while the load runs."""

    def __init__(self, guest: Guest, monitor: Monitor, workers: int) -> None:
        self.monitor = monitor
        self._workers = workers
        self.guest = guest

    def be_busy(self) -> None:
        """Begin the load: what it allocates is in the memory that was added, if there is any."""
        super().__init__(self.guest, self._workers)

    def total(self) -> int:
        """Bytes that the guest's kernel has."""
        return int(self.guest.check("grep MemTotal /proc/meminfo").split()[1]) << 10

    def wait_total(self, least: int, most: int) -> None:
        deadline = time.monotonic() + _SECONDS
        while not least <= (total := self.total()) <= most:
            assert time.monotonic() < deadline, f"{total >> 20} MiB\n{self.guest.console}"
            time.sleep(0.05)

    def resize(self, size: int) -> None:
        """Have virtio-mem give so much."""
        path = "/machine/peripheral/virtio-mem"
        self.monitor.ask("qom-set", path=path, property="requested-size", value=size)

    def movable_in_use(self) -> int:
        """Bytes of added memory that processes have."""
        zone = "/Node 0, zone +Movable/,/start_pfn/"
        words = self.guest.check(
            f'awk \'{zone} {{if ($1=="managed") m=$2; if ($2=="free") f=$3}} END {{print m-f}}\''
            " /proc/zoneinfo"
        )
        return int(words) << 12


@contextmanager
def growing_guest(path: Path, folder: Path, load: Path, *arguments: str) -> Iterator[GrowingGuest]:
    qmp = folder / "qmp"
    memory = ("-m", "slots=4,maxmem=2G", "-qmp", f"unix:{qmp},server=on,wait=off")
    with Guest(
        [GuestDisk(path, queues=2)],
        cpus=2,
        memory_mib=256,
        programs=(str(load),),
        modules=(*VIRTIO_MODULES, "virtio_mem"),
        kernel_arguments="memhp_default_state=online_movable",
        extra_arguments=[*memory, *arguments],
    ) as guest:
        monitor = Monitor(qmp)
        try:
            yield GrowingGuest(guest, monitor, workers=4)
        finally:
            monitor.close()


def add_dimm(guest: GrowingGuest, name: str, backend: str, **options: object) -> None:
    before = guest.total()
    options |= {"qom-type": backend, "id": f"m-{name}", "size": _BLOCK, "share": True}
    guest.monitor.ask("object-add", **options)
    guest.monitor.ask("device_add", driver="pc-dimm", id=name, memdev=f"m-{name}")
    guest.wait_total(before + _BLOCK // 2, before + 2 * _BLOCK)


def remove_dimm(guest: GrowingGuest, name: str) -> None:
    before = guest.total()
    guest.monitor.ask("device_del", id=name)
    guest.wait_total(0, before - _BLOCK // 2)
    deadline = time.monotonic() + _SECONDS
    while any(d["data"]["id"] == name for d in guest.monitor.ask("query-memory-devices")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    guest.monitor.ask("object-del", id=f"m-{name}")


def held(process: DaemonProcess) -> Resources:
    """But for threads: there is a pool."""
    now = Resources.of(process.pid)
    now.threads.clear()
    return now


@pytest.mark.timeout(400)
@pytest.mark.parametrize("data_path", ["native", "python"])
def test_guest_whose_memory_is_in_huge_pages_works_and_leaves_none_in_use(
    daemon: DaemonStarter,
    socket_directory: Path,
    tmp_path: Path,
    load_program: Path,
    data_path: str,
) -> None:
    """All of it: kernel, rings and data; with O_DIRECT, through both data paths."""
    path = socket_directory / "s"
    words = [*serve(tmp_path / "disk.img", "raw")[2:], "--cache", "none", "--socket", str(path)]
    process = daemon(*words, "--data-path", data_path, sockets=[path])
    with huge_pages(_HUGE_GUEST_MIB << 20 >> 21):
        with Guest(
            [GuestDisk(path, queues=2)],
            cpus=2,
            memory_mib=_HUGE_GUEST_MIB,
            huge_pages=True,
            programs=(str(load_program),),
        ) as guest:
            maps = Path(f"/proc/{process.pid}/smaps").read_text()
            assert f"KernelPageSize:     {HUGE_PAGE >> 10} kB" in maps
            load = BusyGuest(guest, workers=4)
            load.goes_on()
            assert load.finish() > 0
        # QEMU is gone, so what is still in use would be the daemon's.
        in_use = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
        deadline = time.monotonic() + _SECONDS
        while (in_use / "nr_hugepages").read_text() != (in_use / "free_hugepages").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert process.stop() == 0


@pytest.mark.timeout(400 + 100 * HUNT)
def test_memory_of_a_busy_guest_comes_and_goes(
    daemon: DaemonStarter, socket_directory: Path, tmp_path: Path, load_program: Path
) -> None:
    """DIMMs in memory, in huge pages if there are any, and in a file; and virtio-mem."""
    path = socket_directory / "s"
    words = [*serve(tmp_path / "disk.img", "raw")[2:], "--cache", "none", "--socket", str(path)]
    process = daemon(*words, sockets=[path])
    growing = (
        *("-object", f"memory-backend-memfd,id=more,size={_BLOCK},share=on"),
        *("-device", "virtio-mem-pci,id=virtio-mem,memdev=more,requested-size=0"),
    )
    with (
        huge_pages(_BLOCK // HUGE_PAGE, skip=False) as is_huge,
        growing_guest(path, socket_directory, load_program, *growing) as guest,
    ):
        before = held(process)
        add_dimm(guest, "a", "memory-backend-memfd")
        guest.be_busy()
        assert guest.movable_in_use() >= 4 * 64 << 10  # the buffers of the load
        for _ in range(HUNT):
            file = {"mem-path": str(tmp_path / "memory")}
            add_dimm(guest, "b", "memory-backend-file", **file)
            remove_dimm(guest, "a")
            guest.goes_on()
            size = guest.total()
            guest.resize(_BLOCK)
            guest.wait_total(size + _BLOCK // 2, size + 2 * _BLOCK)
            remove_dimm(guest, "b")
            guest.goes_on()
            add_dimm(guest, "a", "memory-backend-memfd", hugetlb=is_huge)
            size = guest.total()
            guest.resize(0)
            guest.wait_total(0, size - _BLOCK // 2)
            guest.goes_on()
        remove_dimm(guest, "a")
        guest.goes_on()
        assert not held(process).beyond(before)
        print(guest.finish(), "requests of the slowest worker; huge pages:", is_huge)
    assert process.stop() == 0
