"""Checks of packed rings: the same requests through the other format.

VIRTIO 1.2 §2.8. What is in a packed ring is the driver's half's business (`virtio.packed_driver`), which raises when
the device breaks its rules; here it is used in ways that make the ring wrap, fill up, stop and go on.
"""

from __future__ import annotations

from vhostblk.client.client import FEATURES
from vhostblk.client.conformance.check import Check, check, collect, expect
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.virtio.blk import RequestType
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS"]

_SPEC = "VIRTIO 1.2 §2.8"
_PACKED = int(Feature.VIRTIO_F_RING_PACKED)
_BITS = int(Feature.VIRTIO_F_INDIRECT_DESC | Feature.VIRTIO_F_EVENT_IDX)


def _guest(rig: Rig, size: int, *, without: int = 0) -> Guest:
    return rig.guest(features=FEATURES | _PACKED, without=without, queue_size=size)


def _rounds(rig: Rig, guest: Guest, count: int, depth: int) -> None:
    """Reads of the first block, so many at a time, each of which must give the same."""
    expected = None
    for _ in range(count):
        pending = [guest.client.submit(RequestType.IN, 0, room=rig.block) for _ in range(depth)]
        guest.client.wait(pending)
        for request in pending:
            content = request.result()
            expect(expected in (None, content), "other data was read")
            expected = content


@check("packed.reads", "a packed ring reads what a split ring reads", _SPEC, features=_PACKED)
def reads(rig: Rig) -> None:
    length = min(rig.span, 128 << 10)
    with rig.guest() as guest:
        split = guest.client.read(0, length)
    with _guest(rig, 64) as guest:
        expect(guest.client.read(0, length) == split, "other data was read")


@check("packed.wraps", "a packed ring goes round, in one descriptor for a request and in three",
       "VIRTIO 1.2 §2.8.1", features=_PACKED)  # fmt: skip
def wraps(rig: Rig) -> None:
    for without in (0, int(Feature.VIRTIO_F_INDIRECT_DESC), _BITS):
        with _guest(rig, 16, without=without) as guest:
            _rounds(rig, guest, 40, 4)


@check("packed.any-size", "a packed ring of a size that is not a power of two is served",
       "VIRTIO 1.2 §2.8.10.1", features=_PACKED)  # fmt: skip
def any_size(rig: Rig) -> str:
    sizes = (3, 7, 100)
    for size in sizes:
        with _guest(rig, size, without=int(Feature.VIRTIO_F_INDIRECT_DESC)) as guest:
            _rounds(rig, guest, size + 5, 1)
    return ", ".join(map(str, sizes))


@check("packed.full", "a packed ring that is full of requests is served", "VIRTIO 1.2 §2.8",
       features=_PACKED)  # fmt: skip
def full(rig: Rig) -> None:
    with _guest(rig, 32, without=int(Feature.VIRTIO_F_INDIRECT_DESC)) as guest:
        _rounds(rig, guest, 6, 10)  # three descriptors each, two are left


@check("packed.restart", "a packed ring that was stopped goes on where it was",
       "vhost-user, VHOST_USER_GET_VRING_BASE", features=_PACKED)  # fmt: skip
def restart(rig: Rig) -> None:
    with _guest(rig, 8, without=int(Feature.VIRTIO_F_INDIRECT_DESC)) as guest:
        for _ in range(20):
            _rounds(rig, guest, 1, 1)
            expected = guest.client.queues[0].driver.base
            found = guest.client.stop_queue(0)
            expect(found == expected, f"{found:#x}, the driver is at {expected:#x}")
            guest.client.start_queue(0, found)


CHECKS: tuple[Check, ...] = collect(globals())
