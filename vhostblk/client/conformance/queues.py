"""Checks of several queues at once, and of data that goes through all of them.

VIRTIO 1.2 §5.2.2; vhost-user, "Multiple queue support".
"""

from __future__ import annotations

from vhostblk.client.client import segments
from vhostblk.client.conformance.check import Check, check, collect, expect
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.shared_memory import SharedMemory
from vhostblk.client.workload import Workload
from vhostblk.virtio.blk import RequestType, Status
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS"]

_SPEC = "VIRTIO 1.2 §5.2.2; vhost-user, Multiple queue support"
# Each takes three file descriptors here.
_MOST = 64
_WORKLOAD_QUEUES = 4


def _count(rig: Rig) -> int:
    return min(rig.offer.queues, _MOST)


@check("queues.all-serve", "every queue that is offered serves, and gives the same data", _SPEC)
def all_serve(rig: Rig) -> str:
    count = _count(rig)
    with rig.guest(queues=count, queue_size=16) as guest:
        expected = guest.read(0, rig.block)
        for index in range(count):
            found = guest.read(0, rig.block, queue=index)
            expect(found == expected, f"queue {index}: other data was read")
    return f"{count} of {rig.offer.queues} queues"


@check("queues.at-once", "requests in flight on all queues at once are served", _SPEC, queues=2)
def at_once(rig: Rig) -> str:
    count = _count(rig)
    with rig.guest(queues=count, queue_size=32) as guest:
        expected = guest.read(0, rig.block)
        for _ in range(3):
            pending = [
                guest.submit(RequestType.IN, 0, room=rig.block, queue=index)
                for _ in range(4)
                for index in range(count)
            ]
            guest.client.wait(pending)
            for one in pending:
                guest.expect_status(one, Status.OK)
                expect(one.content == expected, "other data was read")
    return f"{4 * count} requests on {count} queues"


@check("queues.different-sizes", "queues may have different sizes", _SPEC, queues=2)
def different_sizes(rig: Rig) -> None:
    with rig.guest(queues=0) as guest:
        client = guest.client
        client.make_queues(1, 16)
        small, client.queues = client.queues, []
        client.make_queues(2, 256)
        unused, large = client.queues
        unused.close()
        client.queues = [*small, large]
        for index in (0, 1):
            client.start_queue(index)
        expected = guest.read(0, rig.block)
        for index in (0, 1, 1, 0):
            found = guest.read(0, rig.block, queue=index)
            expect(found == expected, f"queue {index}: other data was read")


@check(
    "queues.written-here-read-there",
    "what one queue wrote another one reads",
    _SPEC,
    queues=2,
    writes=True,
)
def written_here_read_there(rig: Rig) -> None:
    count = _count(rig)
    with rig.guest(queues=count, queue_size=16) as guest:
        for index in range(count):
            data = rig.pattern(rig.block)
            guest.write(0, data, queue=index)
            found = guest.read(0, rig.block, queue=(index + 1) % count)
            expect(found == data, f"queue {(index + 1) % count} read other data")


@check(
    "queues.flush-covers-others",
    "a flush on one queue is accepted after writes on the others",
    "VIRTIO 1.2 §5.2.6.2",
    queues=2,
    features=Feature.VIRTIO_BLK_F_FLUSH,
    writes=True,
)
def flush_covers_others(rig: Rig) -> None:
    with rig.guest(queues=2) as guest:
        for i in range(20):
            guest.write(i * rig.block, rig.pattern(rig.block), queue=i % 2)
            guest.expect_status(guest.run(RequestType.FLUSH, queue=1 - i % 2), Status.OK)


def _integrity(rig: Rig, without: int, queues: int, requests: int) -> str:
    with rig.guest(
        queues=min(queues, rig.offer.queues),
        without=without,
        memory=lambda: SharedMemory([8 << 20] * 4, spread=True),
    ) as guest:
        workload = Workload(guest.client, seed=7, span=(0, rig.span), depth=16)
        counts = workload.run(requests)
        workload.verify()
        return f"{counts.written >> 10} KiB written, {counts.compared >> 10} KiB compared"


@check(
    "queues.integrity",
    "random requests on one queue: what was written is read",
    "VIRTIO 1.2 §5.2.6",
    writes=True,
)
def integrity(rig: Rig) -> str:
    return _integrity(rig, 0, 1, 800)


@check(
    "queues.integrity-without-extras",
    "the same without EVENT_IDX and indirect tables",
    "VIRTIO 1.2 §5.2.6",
    writes=True,
)
def integrity_without_extras(rig: Rig) -> str:
    extras = Feature.VIRTIO_F_EVENT_IDX | Feature.VIRTIO_F_INDIRECT_DESC
    return _integrity(rig, extras, 1, 500)


@check(
    "queues.integrity-of-several",
    "the same on several queues at once",
    "VIRTIO 1.2 §5.2.2, §5.2.6",
    queues=2,
    writes=True,
)
def integrity_of_several(rig: Rig) -> str:
    return _integrity(rig, 0, _WORKLOAD_QUEUES, 1500)


@check(
    "queues.same-blocks",
    "a read in flight together with a write of the same block succeeds, and the write is there",
    "VIRTIO 1.2 §5.2.6",
    writes=True,
)
def same_blocks(rig: Rig) -> None:
    with rig.guest(queues=min(2, rig.offer.queues)) as guest:
        last = len(guest.client.queues) - 1
        for i in range(50):
            data = rig.pattern(rig.block)
            writing = guest.submit(RequestType.OUT, 0, out=data)
            reading = guest.submit(RequestType.IN, 0, room=rig.block, queue=last)
            guest.client.wait([writing, reading])
            for one in (writing, reading):
                guest.expect_status(one, Status.OK)
            expect(guest.read(0, rig.block) == data, f"turn {i}: the write is not there")


@check(
    "queues.zeroes-after-writes",
    "writes and zeroes of neighbouring blocks in flight do not mix",
    "VIRTIO 1.2 §5.2.6",
    features=Feature.VIRTIO_BLK_F_WRITE_ZEROES,
    writes=True,
)
def zeroes_after_writes(rig: Rig) -> None:
    block = rig.block
    with rig.guest() as guest:
        guest.write(0, rig.pattern(32 * block))
        data = rig.pattern(16 * block)
        pending = []
        for i in range(16):
            out = data[i * block : (i + 1) * block]
            pending.append(guest.submit(RequestType.OUT, 2 * i * block, out=out))
            zero = segments([((2 * i + 1) * block, block)])
            pending.append(guest.submit(RequestType.WRITE_ZEROES, out=zero))
        guest.client.wait(pending)
        for one in pending:
            guest.expect_status(one, Status.OK)
        found = guest.read(0, 32 * block)
        for i in range(16):
            start = 2 * i * block
            expect(found[start : start + block] == data[i * block : (i + 1) * block], f"block {i}")
            expect(not any(found[start + block : start + 2 * block]), f"zeroes behind block {i}")


CHECKS: tuple[Check, ...] = collect(globals())
