"""Checks of the ring itself: sizes, indices that wrap, many requests, all chains at once.

VIRTIO 1.2 §2.7. The requests cost as little as a request can, because there are many.
"""

from __future__ import annotations

from collections.abc import Callable

from vhostblk.client.conformance.check import Check, Level, check, collect, expect, skip
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.virtio.blk import HEADER, ID_BYTES, RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS"]

_INDIRECT, _EVENT_IDX = Feature.VIRTIO_F_INDIRECT_DESC, Feature.VIRTIO_F_EVENT_IDX
_ROUNDS = 65536
_SIZES = (2, 4, 16, 128, 1024, 32768)


def _check_size(size: int) -> Callable[[Rig], str]:
    def run(rig: Rig) -> str:
        # Of 32768 indirect tables there is no room for; a ring of 2 cannot hold a request without.
        without = 0 if size < 4 else _INDIRECT
        if size < 4 and not rig.offer.features & _INDIRECT:
            skip("needs INDIRECT_DESC")
        with rig.guest(queue_size=size, without=without) as guest:
            # From a little before the end of the ring, so that large ones go round, too.
            guest.client.stop_queue(0)
            guest.driver().set_indices(max(0, size - 100))
            guest.client.start_queue(0)
            expected = _first_block(rig, guest)
            depth = max(1, min(size // 4, 128))
            count = 0
            while count < max(40, min(3 * size, 500)):
                pending = [
                    guest.submit(RequestType.IN, 0, room=rig.block, notify=False)
                    for _ in range(depth)
                ]
                guest.queue().notify()
                guest.client.wait(pending)
                count += depth
                for one in pending:
                    guest.expect_status(one, Status.OK)
                    expect(one.content == expected, f"request {count}: other data was read")
            expect(guest.client.stop_queue(0) == guest.driver().avail_idx, "wrong VRING_BASE")
        return f"{count} requests"

    return run


def _first_block(rig: Rig, guest: Guest) -> bytes:
    """Read, and kick whether asked for or not: avail_event may be that of another index."""
    pending = guest.submit(RequestType.IN, 0, room=rig.block, notify=False)
    guest.driver().publish()
    guest.queue().kick()
    guest.client.wait([pending])
    guest.expect_status(pending, Status.OK)
    return pending.content


_SIZE_CHECKS = tuple(
    Check(
        f"ring.size-{size}", f"a ring of {size} entries works", "VIRTIO 1.2 §2.7", _check_size(size)
    )
    for size in _SIZES
)


@check(
    "ring.size-1",
    "a ring of 1 entry works",
    "VIRTIO 1.2 §2.7",
    level=Level.SHOULD,
    features=_INDIRECT,
)
def size_1(rig: Rig) -> str:
    return _check_size(1)(rig)


@check(
    "ring.indices-wrap",
    "more than 65536 requests go through a ring, so that its indices wrap",
    "VIRTIO 1.2 §2.7.6, §2.7.8",
)
def indices_wrap(rig: Rig) -> str:
    with rig.guest(queue_size=256, without=_INDIRECT) as guest:
        header, data, status, expected = _shared_request(guest)
        driver, queue, memory = guest.driver(), guest.queue(), guest.client.memory
        done = 0
        while done < _ROUNDS + 1000:
            for _ in range(64):
                driver.add([header], [data, status])
            queue.notify()
            guest.client.wait_until(lambda: not driver.in_flight)
            done += len(queue.foreign)
            most = max(used.written for used in queue.foreign)
            expect(most <= ID_BYTES + 1, f"used length {most}")
            queue.foreign.clear()
        expect(memory.read(status) == b"\0", "the last request failed")
        expect(memory.read(data) == expected, "the last request gave other data")
        base = guest.client.stop_queue(0)
        expect(base == driver.avail_idx, f"VRING_BASE {base} after {driver.avail_idx}")
        return f"{done} requests"


def _shared_request(guest: Guest) -> tuple[Buffer, Buffer, Buffer, bytes]:
    """One GET_ID that any number of chains may share: all write the same."""
    memory = guest.client.memory
    room = memory.allocate(4096, alignment=4096)
    header, data = Buffer(room.gpa, HEADER.size), Buffer(room.gpa + 64, ID_BYTES)
    status = Buffer(room.gpa + 128, 1)
    memory.write(header.gpa, HEADER.pack(RequestType.GET_ID, 0, 0))
    guest.chain([header], [data, status])
    return header, data, status, memory.read(data)


@check(
    "ring.full",
    "every descriptor of a ring may be in flight",
    "VIRTIO 1.2 §2.7.5, §2.7.6",
)
def full(rig: Rig) -> str:
    with rig.guest(queue_size=256, without=_INDIRECT) as guest:
        for _ in range(5):
            pending = guest.identify(256 // 3)
            guest.client.wait(pending)
            for one in pending:
                guest.expect_status(one, Status.OK)
    return f"{256 // 3} chains of 3"


@check(
    "ring.full-of-tables",
    "a ring full of indirect requests is served",
    "VIRTIO 1.2 §2.7.5.3",
    features=_INDIRECT,
)
def full_of_tables(rig: Rig) -> str:
    with rig.guest(queue_size=256) as guest:
        for _ in range(5):
            pending = guest.identify(256)
            expect(guest.driver().free_descriptors == 0, "the ring is not full")
            guest.client.wait(pending)
            for one in pending:
                guest.expect_status(one, Status.OK)
    return "256 chains"


@check(
    "ring.begins-anywhere",
    "a ring may begin at any index",
    "vhost-user, VHOST_USER_SET_VRING_BASE",
)
def begins_anywhere(rig: Rig) -> None:
    with rig.guest(queue_size=64) as guest:
        expected = guest.read(0, rig.block)
        for base in (1, 63, 64, 12345, 65535):
            guest.client.stop_queue(0)
            guest.driver().set_indices(base)
            guest.client.start_queue(0)
            for _ in range(5):
                found = _first_block(rig, guest)
                expect(found == expected, f"base {base}: other data was read")
            expect(guest.used_idx() == base + 5 & 0xFFFF, f"base {base}: used.idx")


@check(
    "ring.wraps-in-a-batch",
    "a batch that crosses the wrap of the indices is served",
    "VIRTIO 1.2 §2.7.6, §2.7.8",
)
def wraps_in_a_batch(rig: Rig) -> None:
    for without in (0, _EVENT_IDX):
        with rig.guest(queue_size=64, without=without) as guest:
            guest.client.stop_queue(0)
            guest.driver().set_indices(65536 - 20)
            guest.client.start_queue(0)
            for _ in range(4):
                pending = guest.identify(16)
                guest.client.wait(pending)
                for one in pending:
                    guest.expect_status(one, Status.OK)


@check(
    "ring.one-memory-for-all",
    "rings and data anywhere in guest memory, aligned to what the rings need",
    "VIRTIO 1.2 §2.7; vhost-user, VHOST_USER_SET_VRING_ADDR",
)
def anywhere(rig: Rig) -> None:
    with rig.guest(memory=lambda: SharedMemory([16 << 20], spread=True)) as guest:
        expected = guest.read(0, rig.block)
        for shift in (16, 48, 4096 - 16):
            guest.client.stop_queue(0)
            hole = guest.client.memory.allocate(shift)
            guest.client.make_queues(1, 8, alignment=16)
            guest.client.start_queue(0)
            for _ in range(20):
                expect(guest.read(0, rig.block) == expected, "other data was read")
            guest.client.memory.free(hole)


@check(
    "ring.many-at-once",
    "a batch is taken with one kick",
    "VIRTIO 1.2 §2.7.13.4",
)
def many_at_once(rig: Rig) -> None:
    with rig.guest(queue_size=512) as guest:
        for count in (1, 2, 100, 1, 150):
            before = guest.queue().kicks
            pending = guest.identify(count)
            guest.finish(pending)
            expect(guest.queue().kicks == before + 1, "kicks")
            for one in pending:
                guest.expect_status(one, Status.OK)


CHECKS: tuple[Check, ...] = (*_SIZE_CHECKS, *collect(globals()))
