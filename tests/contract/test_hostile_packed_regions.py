"""In-flight regions of packed rings that make no sense cost their ring, those that change in use nobody else.

vhost-user, "Inflight I/O tracking"; what test_inflight_contract.py has of split rings.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.daemons import BOTH_PATHS, Disks
from vhostblk.client.client import FEATURES, Client
from vhostblk.errors import PeerError
from vhostblk.vhost.inflight import PACKED_ENTRY, PACKED_HEADER, VERSION_OFFSET
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.features import Feature

SIZE = 64
PACKED = FEATURES | int(Feature.VIRTIO_F_RING_PACKED)
FREE_HEADS, USED, OLD_USED, INFLIGHT, NEXT = 12, 16, 18, 0, 2


def entry(number: int, field: int) -> int:
    """Where a field of an entry is."""
    return PACKED_HEADER.size + number * PACKED_ENTRY.size + field


def view(client: Client) -> memoryview:
    assert client.inflight is not None
    return client.inflight.view


@contextmanager
def stopped(disks: Disks, export: str = "memory") -> Iterator[tuple[Client, int]]:
    """A client whose ring is stopped after use, and where it is to go on."""
    with disks.connect(export, queue_size=SIZE, features=PACKED) as client:
        for _ in range(5):
            client.read(0, 512)
        yield client, client.stop_queue(0)


NONSENSE: dict[str, tuple[int, bytes]] = {
    "another version": (VERSION_OFFSET, b"\7\0"),
    "features that nobody knows": (0, b"\1"),
    "fewer descriptors than the ring has": (10, b"\1\0"),
    "more descriptors than there is room for": (10, b"\xff\xff"),
    "a used index behind the ring": (USED, b"\xff\xff\xff\xff"),
    "an old used index behind the ring": (OLD_USED, b"\xff\xff"),
    "free lists that begin nowhere": (FREE_HEADS, b"\xff\xff\xff\xff"),
    "a free list that goes round": (entry(SIZE - 1, NEXT), b"\0\0"),
    "a free list that ends early": (entry(3, NEXT), b"\xff\xff"),
    "a flag that is neither 0 nor 1": (entry(9, INFLIGHT), b"\xee"),
}


@BOTH_PATHS
@pytest.mark.parametrize("name", NONSENSE)
def test_region_that_makes_no_sense_keeps_its_ring_from_starting(disks: Disks, name: str) -> None:
    with stopped(disks) as (client, base):
        offset, data = NONSENSE[name]
        before = bytes(view(client))
        view(client)[offset : offset + len(data)] = data
        with pytest.raises(PeerError, match="refused"):
            client.start_queue(0, base)
        assert client.control.is_alive()
        view(client)[:] = before
        client.start_queue(0, base)
        client.read(0, 512)
    assert "in-flight region" in disks.said


def chains_of_nonsense(rnd: random.Random, memory: memoryview, in_flight: int) -> None:
    """A region whose lists are whole, with descriptors that are not."""
    order = rnd.sample(range(SIZE), SIZE)
    for number in range(SIZE):
        PACKED_ENTRY.pack_into(memory, entry(number, 0), 0, 0, 0, 0, 0, 0, 0, 0, 0)
    for position, number in enumerate(order):
        is_last = position == SIZE - 1
        following = SIZE if is_last or position < in_flight else order[position + 1]
        marked = int(position < in_flight)
        fields = (marked, following, number, marked, rnd.getrandbits(64))
        descriptor = (
            rnd.getrandbits(16),
            rnd.choice([0, 1, 2, 3, 4, 6, 7, 0xFFFF]),
            rnd.choice([0, 1, 16, 512, 0xFFFFFFFF]),
            rnd.choice([0, 0x1000, rnd.getrandbits(20), rnd.getrandbits(64)]),
        )
        PACKED_ENTRY.pack_into(memory, entry(number, 0), *fields, *descriptor)
    free = order[in_flight] if in_flight < SIZE else SIZE
    PACKED_HEADER.pack_into(memory, 0, 0, 1, SIZE, free, free, 5, 5, 1, 1)


@BOTH_PATHS
def test_any_bytes_in_a_region_are_refused_or_bounded_work(disks: Disks) -> None:
    rnd = random.Random(9)
    disks.max_lines = 250
    replayed = 0
    for number in range(24):
        with stopped(disks) as (client, base):
            memory = view(client)
            if number % 3 == 0:
                memory[:] = rnd.randbytes(len(memory))
            elif number % 3 == 1:
                chains_of_nonsense(rnd, memory, rnd.choice([1, 2, 17, SIZE]))
            else:
                for _ in range(rnd.randrange(1, 30)):
                    memory[rnd.randrange(len(memory))] = rnd.randrange(256)
                struct.pack_into("=H", memory, VERSION_OFFSET, 1)
            try:
                client.start_queue(0, base)
                replayed += number % 3 == 1
            except PeerError:
                assert client.control.is_alive()
            client.abandon()
    assert replayed, "nothing was served again"
    with disks.connect("memory") as client:
        client.read(0, 512)


@BOTH_PATHS
def test_front_end_that_changes_a_region_in_use_harms_only_itself(disks: Disks) -> None:
    rnd = random.Random(8)
    with disks.connect("memory", queue_size=SIZE, features=PACKED) as client:
        for _ in range(30):
            pending = [client.submit(RequestType.IN, 0, room=512) for _ in range(8)]
            view(client)[:] = rnd.randbytes(len(view(client)))
            client.wait(pending)
        client.stop_queue(0)
    with disks.connect("memory", features=PACKED) as client:
        client.read(0, 512)
