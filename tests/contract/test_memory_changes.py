"""What every data path owes a front-end whose guest memory changes while rings run, split or packed.

vhost-user, ADD_MEM_REG, REM_MEM_REG, SET_MEM_TABLE. What a hostile one does is in
tests/integration/test_hostile_memory.py, and any order of all of it in tests/fuzz/test_fuzz_memory_map.py.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.daemons import ALL_PATHS, BOTH_PATHS, CAPACITY, SERIAL, Disks, eventually
from tests.memory_load import ChangingMemory, DistantLoad
from tests.schedule import HUNT
from vhostblk.client.client import FEATURES, Client
from vhostblk.client.memory_copy import LOG_PAGE, MemoryCopy
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.errors import PeerError
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature

MIB = 1 << 20
FORMATS = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
NO_TABLES = FEATURES & ~Feature.VIRTIO_F_INDIRECT_DESC


def connect(
    disks: Disks, export: str, packed: bool, *, features: int = FEATURES, **options: Any
) -> Client:
    """A client whose rings are in the first region."""
    features |= Feature.VIRTIO_F_RING_PACKED if packed else 0
    memory = options.pop("memory", None) or SharedMemory([4 * MIB], spread=True)
    client = disks.connect(export, features=features, memory=memory, **options)
    assert bool(client.control.features & Feature.VIRTIO_F_RING_PACKED) == packed
    return client


# ---------------------------------------------------------------- under load


@ALL_PATHS
@FORMATS
@pytest.mark.parametrize("export", ["disk", "direct", "pinned"])
def test_memory_comes_and_goes_under_load(disks: Disks, export: str, packed: bool) -> None:
    with connect(disks, export, packed, queues=4) as client:
        load = ChangingMemory(client, seed=1, span=(0, 4 * MIB), depth=32)
        load.run(300 * HUNT)
        load.verify()
        assert load.changes > 10
        load.leave()


@BOTH_PATHS
@FORMATS
def test_memory_that_goes_is_unmapped_while_the_rest_is_in_use(disks: Disks, packed: bool) -> None:
    with connect(disks, "pinned", packed) as client:
        client.read(0, 65536)
        before = disks._resources()
        load = ChangingMemory(client, seed=2, span=(0, 4 * MIB), depth=16, every=2)
        load.run(60)
        load.leave()
        client.read(0, 512)
        eventually(lambda: not disks._resources().beyond(before), "nothing to be left")


@ALL_PATHS
@FORMATS
def test_what_is_written_to_memory_that_comes_and_goes_is_logged(
    disks: Disks, packed: bool
) -> None:
    with connect(disks, "direct", packed, queues=2) as client:
        client.memory.written = set()
        copy = MemoryCopy(client)
        copy.start()
        load = ChangingMemory(client, seed=3, span=(0, 2 * MIB), depth=16, copy=copy)
        for _ in range(4):
            load.run(40)
            copy.round()
        for index in range(2):
            client.stop_queue(index)
        copy.round()
        rings = [queue._area for queue in client.queues]
        own = {page for area in rings for page in range(area.gpa, area.gpa + area.length, LOG_PAGE)}
        regions = client.memory.regions
        for page in own | client.memory.written:
            if any(region.gpa <= page < region.end for region in regions):
                copy.copy(page)
        assert copy.differences() == []
        assert load.changes > 5
        copy.close()


# ---------------------------------------------------------------- requests that name what goes


def fill(client: Client, data: bytes, buffer: Buffer) -> None:
    client.memory.write(buffer.gpa, data * (buffer.length // len(data)))


@ALL_PATHS
@FORMATS
@pytest.mark.parametrize("export", ["direct", "pinned", "slow"])
def test_request_that_names_memory_that_goes_is_done_or_fails_and_is_over(
    disks: Disks, export: str, packed: bool
) -> None:
    with connect(disks, export, packed, features=NO_TABLES, strict=False) as client:
        load = DistantLoad(client)
        region = client.add_memory(MIB)
        on_disk = [client.read(i * 65536, 65536) for i in range(16)] if export != "slow" else None
        data = [Buffer(region.gpa + i * 65536, 65536) for i in range(16)]
        for buffer in data:
            fill(client, b"#", buffer)
        requests = [
            load.submit(RequestType.IN, i * 65536, [buffer], notify=False)
            for i, buffer in enumerate(data)
        ]
        client.queues[0].notify()
        client.control.remove_region(region)
        # From here on nobody touches it. What was taken before is done, and the driver can see it.
        contents = [client.memory.read(buffer) for buffer in data]
        load.finish()
        for i, (request, content) in enumerate(zip(requests, contents, strict=True)):
            there = on_disk[i] if on_disk is not None else bytes(65536)
            assert request.status in (Status.OK, Status.IOERR)
            assert content == (there if request.status == Status.OK else b"#" * 65536)
            assert content == client.memory.read(data[i])
        assert client.get_id() == SERIAL


@ALL_PATHS
@FORMATS
def test_request_that_names_memory_that_is_gone_fails_and_touches_nothing(
    disks: Disks, packed: bool
) -> None:
    with connect(disks, "disk", packed, features=NO_TABLES, strict=False) as client:
        client.write(0, b"=" * 65536)
        load = DistantLoad(client)
        region, other = client.add_memory(MIB), client.add_memory(MIB)
        stays = Buffer(other.gpa, 32768)
        for buffer in (Buffer(region.gpa, 65536), stays):
            fill(client, b"#", buffer)
        client.control.remove_region(region)
        for data in ([Buffer(region.gpa, 65536)], [stays, Buffer(region.gpa, 32768)]):
            for kind in (RequestType.IN, RequestType.OUT):
                request = load.submit(kind, 0, data)
                load.finish()
                assert request.status == Status.IOERR
                assert set(client.memory.read(data[0])) == set(b"#")
        assert client.read(0, 65536) == b"=" * 65536
        # It comes back: the same request works.
        client.control.add_region(region)
        request = load.submit(RequestType.IN, 0, [stays, Buffer(region.gpa, 32768)])
        load.finish()
        assert request.status == Status.OK
        assert set(client.memory.read(Buffer(region.gpa, 32768))) == set(b"=")
        with pytest.raises(BlockingIOError):
            os.eventfd_read(client.queues[0].err_fd)


# ---------------------------------------------------------------- hundreds of regions


@BOTH_PATHS
@FORMATS
@pytest.mark.parametrize("export", ["disk", "pinned"])
def test_hundreds_of_regions_are_served_and_one_more_is_refused(
    disks: Disks, export: str, packed: bool
) -> None:
    # Without gaps: requests of 64 KiB are in five regions each.
    memory = SharedMemory([MIB] + [16384] * 508, gap=0, one_file=True, spread=True)
    with connect(disks, export, packed, memory=memory, queues=2) as client:
        assert len(memory.regions) == 509
        load = ChangingMemory(client, seed=4, span=(0, 2 * MIB), depth=24, most=508, every=4)
        load.run(60)
        while len(memory.regions) < 509:
            client.add_memory(16384)
        region = memory.add_region(16384)
        with pytest.raises(PeerError):
            client.control.add_region(region)
        memory.remove_region(region)
        load.run(30)
        load.verify()
        client.read(CAPACITY - 512, 512)


@BOTH_PATHS
def test_nothing_is_left_of_hundreds_of_regions(disks: Disks) -> None:
    before = disks._resources()
    memory = SharedMemory([MIB] + [4096] * 508, gap=0, one_file=True)
    with connect(disks, "pinned", packed=False, memory=memory) as client:
        client.read(0, 512)
    eventually(lambda: not disks._resources().beyond(before), "nothing to be left")
