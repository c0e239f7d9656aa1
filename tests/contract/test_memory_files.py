"""What every data path owes a front-end whatever its memory is made of: huge pages, files, holes, pieces of a file.

vhost-user, "Memory region description". Files that are not what they seem are in
tests/integration/test_hostile_memory.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.daemons import BOTH_PATHS, SERIAL, Disks, eventually
from tests.huge_pages import HUGE_PAGE, huge_file, huge_pages
from tests.integration.test_hostile_memory import is_over, leave, next_client_is_served
from tests.memory_load import ChangingMemory, DistantLoad
from tests.probes import mounted
from vhostblk.client.client import FEATURES
from vhostblk.client.shared_memory import MakeFile, SharedMemory
from vhostblk.errors import PeerError
from vhostblk.vhost.message import MemoryRegion
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature

pytestmark = BOTH_PATHS

MIB = 1 << 20
PAGE = 4096
NO_TABLES = FEATURES & ~Feature.VIRTIO_F_INDIRECT_DESC


def file_in(folder: str | Path) -> MakeFile:
    """Files without a name, and without a block that was not written."""

    def make(size: int) -> int:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.truncate(size)
            return os.dup(file.fileno())

    return make


@pytest.fixture(params=["huge pages", "file", "tmpfs"])
def memory(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[MakeFile, int]]:
    """Who makes files, and what their sizes are multiples of."""
    match request.param:
        case "huge pages":
            with huge_pages(24):
                yield huge_file, HUGE_PAGE
        case "file":
            yield file_in(tmp_path), PAGE
        case _:
            yield file_in("/dev/shm"), PAGE


@pytest.mark.parametrize("export", ["disk", "pinned"])
def test_memory_of_every_kind_comes_and_goes_under_load(
    disks: Disks, memory: tuple[MakeFile, int], export: str
) -> None:
    make, unit = memory
    guest = SharedMemory([4 * MIB], kind=make, spread=True)
    with disks.connect(export, queues=2, memory=guest) as client:
        load = ChangingMemory(
            client,
            seed=1,
            span=(0, MIB),
            depth=16,
            every=4,
            unit=unit,
            units=2 if unit > PAGE else 64,
        )
        load.run(80)
        load.verify()
        assert load.changes > 3


def test_memory_of_every_kind_is_served_piece_by_piece(
    disks: Disks, memory: tuple[MakeFile, int]
) -> None:
    """As QEMU gives the first MiB of a PC: at offsets that are no multiples of a huge page, with a hole."""
    make, _ = memory
    home = SharedMemory([4 * MIB])
    with disks.connect(features=NO_TABLES, memory=home, strict=False) as client:
        client.write(0, b"=" * 65536)
        whole = SharedMemory([4 * MIB], kind=make)
        (region,) = whole.regions
        gpa, uva = 1 << 40, 0x51 << 40
        for start, end in ((0, 0xA0000), (0xC0000, 4 * MIB)):
            piece = MemoryRegion(gpa + start, end - start, uva + start, start)
            client.control.ask(client.control.frontend.add_mem_reg(piece, region.fd))
        load = DistantLoad(client)
        for start, expected in (
            (0x9F000, Status.OK),
            (0x9F001, Status.IOERR),
            (0xBFFFF, Status.IOERR),
            (0xC0000, Status.OK),
            (0x1FF800, Status.OK),  # from one huge page into the next
            (4 * MIB - 4096, Status.OK),
        ):
            region.view[start : start + 4096] = b"#" * 4096
            request = load.submit(RequestType.IN, 0, [Buffer(gpa + start, 4096)])
            load.finish()
            assert request.status == expected
            found = bytes(region.view[start : start + 4096])
            assert found == (b"=" if expected == Status.OK else b"#") * 4096
        whole.close()
        assert client.get_id() == SERIAL


def test_huge_pages_that_are_cut_off_cost_the_session(disks: Disks) -> None:
    with huge_pages(4), disks.connect("memory") as other:
        memory = SharedMemory([2 * MIB, 4 * MIB], kind=huge_file)
        client = disks.connect(features=NO_TABLES, memory=memory, strict=False)
        load = DistantLoad(client)
        _, last = memory.regions
        load.submit(RequestType.GET_ID, 0, [Buffer(last.end - 20, 20)])
        load.finish()
        last.truncate(HUGE_PAGE)
        # What the kernel finds missing costs a request, what we find missing the session.
        read = load.submit(RequestType.IN, 0, [Buffer(last.gpa + HUGE_PAGE - 4096, 8192)])
        load.finish()
        assert read.status == Status.IOERR
        load.submit(RequestType.GET_ID, 0, [Buffer(last.end - 20, 20)])
        eventually(lambda: is_over(client), "the end of the session")
        leave(client)
        assert len(other.read(0, 512)) == 512
    next_client_is_served(disks)


def test_region_in_huge_pages_beyond_the_pool_is_refused_or_costs_its_session(disks: Disks) -> None:
    """A file may promise more than the kernel has: mapping it reserves what is not there."""
    with huge_pages(4), disks.connect() as client:
        fd = huge_file(1 << 40)
        region = MemoryRegion(1 << 44, 1 << 40, 1 << 44, 0)
        with pytest.raises(PeerError, match="refused"):
            client.control.ask(client.control.frontend.add_mem_reg(region, fd))
        os.close(fd)
        assert client.get_id() == SERIAL


def test_memory_in_a_file_system_that_is_full_costs_the_session(
    disks: Disks, tmp_path: Path
) -> None:
    """Sparse files promise more than there is, too: the first touch of a page raises SIGBUS."""
    folder = tmp_path / "full"
    folder.mkdir()
    with mounted("none", folder, "-t", "tmpfs", "-o", "size=64k"):
        with disks.connect(features=NO_TABLES, strict=False) as client:
            load = DistantLoad(client, 32)
            fd = file_in(folder)(4 * MIB)
            region = MemoryRegion(1 << 40, 4 * MIB, 1 << 40, 0)
            client.control.ask(client.control.frontend.add_mem_reg(region, fd))
            os.close(fd)
            load.submit(RequestType.GET_ID, 0, [Buffer(1 << 40, 20)])
            load.finish()
            for page in range(1, 32):
                load.submit(RequestType.GET_ID, 0, [Buffer((1 << 40) + page * PAGE, 20)])
            eventually(lambda: is_over(client), "the end of the session")
            client.abandon()
        next_client_is_served(disks)
