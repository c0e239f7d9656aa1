"""Checks of framing: a request means the same however it is cut into descriptors.

VIRTIO 1.2 §2.7.4.1 and §2.7.5.3. Reads are compared with one that is framed as Linux does it; where
the disk may be written, everything is also written in that framing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from vhostblk.client.conformance.check import Check, check, collect, expect, skip
from vhostblk.client.conformance.guest import Guest, status_name
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.queue import Framing, whole
from vhostblk.virtio.blk import HEADER, RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature
from vhostblk.virtio.split import DESC, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE

__all__ = ["CHECKS"]

_SPEC = "VIRTIO 1.2 §2.7.4.1"
_INDIRECT = Feature.VIRTIO_F_INDIRECT_DESC
_NEXT, _WRITE = DESC_F_NEXT, DESC_F_WRITE


def _pieces(size: int) -> Framing:
    return lambda length: [min(size, length - start) for start in range(0, length, size)]


def _cut_at(*ends: int) -> Framing:
    def cut(length: int) -> Sequence[int]:
        borders = [0, *(end for end in ends if end < length), length]
        return [b - a for a, b in itertools.pairwise(borders)]

    return cut


_FRAMINGS: tuple[tuple[str, str, Framing | None], ...] = (
    ("usual", "header, data and status in descriptors of their own", None),
    ("whole", "header and data in one descriptor, data and status in one", whole),
    ("header-split", "the header in pieces of 1, 7, 7 and 1 bytes", _cut_at(1, 8, 15, 16)),
    ("header-with-data", "half the header apart, the rest beside the data", _cut_at(9)),
    ("odd-borders", "data cut at odd bytes", _cut_at(16, 17, 511, 512, 513, 1000)),
    ("odd-pieces", "pieces of 37 bytes", _pieces(37)),
    ("bytes", "the header and the first bytes of data one by one", _cut_at(*range(1, 57))),
)


def _check_framing(framing: Framing | None, indirect: bool) -> Callable[[Rig], str]:
    def run(rig: Rig) -> str:
        without = 0 if indirect else _INDIRECT
        length = 2 * rig.block
        if framing is not None:
            _skip_beyond_seg_max(rig, len(framing(length + HEADER.size)))
        with rig.guest(without=without, queue_size=1024) as guest:
            return _round(rig, guest, framing, length, indirect)

    return run


def _skip_beyond_seg_max(rig: Rig, count: int) -> None:
    most = rig.offer.config.seg_max
    if rig.offer.features & Feature.VIRTIO_BLK_F_SEG_MAX and count > most:
        skip(f"{count} segments, seg_max is {most}")


def _round(
    rig: Rig, guest: Guest, framing: Framing | None, length: int, indirect: bool | None
) -> str:
    expected = guest.read(0, length)
    pending = guest.run(RequestType.IN, 0, room=length, framing=framing, indirect=indirect)
    guest.expect_status(pending, Status.OK)
    expect(pending.content == expected, "other data was read than in the usual framing")
    pending = guest.run(RequestType.GET_ID, room=20, framing=framing, indirect=indirect)
    guest.expect_status(pending, Status.OK)
    if not rig.destructive or rig.offer.is_read_only:
        return "read"
    data = rig.pattern(length)
    pending = guest.run(RequestType.OUT, 0, out=data, framing=framing, indirect=indirect)
    guest.expect_status(pending, Status.OK)
    expect(guest.read(0, length) == data, "other data was written than was sent")
    return "read and written"


_DIRECT_CHECKS = tuple(
    Check(f"framing.{name}", title, _SPEC, _check_framing(framing, False))
    for name, title, framing in _FRAMINGS
)
_INDIRECT_CHECKS = tuple(
    Check(
        f"indirect.{name}",
        f"indirect: {title}",
        "VIRTIO 1.2 §2.7.5.3.2",
        _check_framing(framing, True),
        features=_INDIRECT,
    )
    for name, title, framing in _FRAMINGS
)


@check(
    "framing.links-in-any-order",
    "descriptors of a chain may be anywhere in the table",
    "VIRTIO 1.2 §2.7.5",
)
def links_in_any_order(rig: Rig) -> None:
    with rig.guest(queue_size=64, without=_INDIRECT) as guest:
        expected = guest.read(0, rig.block)
        scene = _Scene(guest, rig.block)
        # 60 -> 3 -> 31: backwards, and far apart.
        half = rig.block // 2 - 1
        driver = guest.driver()
        driver.write_descriptor(60, *scene.header, _NEXT, 3)
        driver.write_descriptor(3, scene.data.gpa, half, _NEXT | _WRITE, 31)
        driver.write_descriptor(31, scene.data.gpa + half, rig.block - half, _NEXT | _WRITE, 9)
        driver.write_descriptor(9, *scene.status, _WRITE, 0)
        scene.offer(60, expected)


@check(
    "indirect.links-in-any-order",
    "descriptors in an indirect table may be linked in any order",
    "VIRTIO 1.2 §2.7.5.3",
    features=_INDIRECT,
)
def indirect_links_in_any_order(rig: Rig) -> None:
    with rig.guest(queue_size=64) as guest:
        expected = guest.read(0, rig.block)
        scene = _Scene(guest, rig.block)
        scene.table(
            (*scene.header, _NEXT, 3),
            (*scene.status, _WRITE, 0),
            (0, 0, 0, 0),
            (*scene.data, _NEXT | _WRITE, 1),
        )
        guest.driver().write_descriptor(5, scene.tables.gpa, 64, DESC_F_INDIRECT, 0)
        scene.offer(5, expected)


@check(
    "indirect.behind-direct",
    "a chain may begin with direct descriptors and end in an indirect one",
    "VIRTIO 1.2 §2.7.5.3.2",
    features=_INDIRECT,
)
def indirect_behind_direct(rig: Rig) -> None:
    with rig.guest(queue_size=64) as guest:
        expected = guest.read(0, rig.block)
        scene = _Scene(guest, rig.block)
        scene.table((*scene.data, _NEXT | _WRITE, 1), (*scene.status, _WRITE, 0))
        driver = guest.driver()
        driver.write_descriptor(0, *scene.header, _NEXT, 1)
        driver.write_descriptor(1, scene.tables.gpa, 32, DESC_F_INDIRECT, 0)
        scene.offer(0, expected)


@check(
    "indirect.write-flag-ignored",
    "WRITE in a descriptor that names a table means nothing",
    "VIRTIO 1.2 §2.7.5.3.2",
    features=_INDIRECT,
)
def indirect_write_ignored(rig: Rig) -> None:
    with rig.guest(queue_size=64) as guest:
        expected = guest.read(0, rig.block)
        scene = _Scene(guest, rig.block)
        scene.table(
            (*scene.header, _NEXT, 1), (*scene.data, _NEXT | _WRITE, 2), (*scene.status, _WRITE, 0)
        )
        flags = DESC_F_INDIRECT | DESC_F_WRITE
        guest.driver().write_descriptor(0, scene.tables.gpa, 48, flags, 0)
        scene.offer(0, expected)


@check(
    "indirect.long-table",
    "an indirect table of more than 100 entries is served",
    "VIRTIO 1.2 §2.7.5.3",
    features=_INDIRECT,
)
def indirect_long_table(rig: Rig) -> str:
    length = 4 * rig.block
    size = -(-length // 124)

    def cut(length: int) -> Sequence[int]:
        return [length] if length == HEADER.size else _pieces(size)(length)

    count = len(cut(length + 1))
    _skip_beyond_seg_max(rig, count)
    with rig.guest(queue_size=128) as guest:
        return f"{count + 1} entries: {_round(rig, guest, cut, length, True)}"


@check(
    "indirect.tables-and-chains",
    "direct and indirect requests share a ring",
    "VIRTIO 1.2 §2.7.5.3",
    features=_INDIRECT,
)
def indirect_tables_and_chains(rig: Rig) -> None:
    with rig.guest(queue_size=256) as guest:
        expected = guest.read(0, rig.block)
        for _ in range(10):
            pending = [
                guest.submit(RequestType.IN, 0, room=rig.block, indirect=bool(i % 2))
                for i in range(64)
            ]
            guest.client.wait(pending)
            for one in pending:
                guest.expect_status(one, Status.OK)
                expect(one.content == expected, "other data was read")


class _Scene:
    """Buffers of one read, for chains that are made by hand."""

    def __init__(self, guest: Guest, length: int) -> None:
        self._guest = guest
        memory = guest.client.memory
        room = memory.allocate(2 * length + 8192, alignment=4096)
        self.header = Buffer(room.gpa, HEADER.size)
        self.tables = Buffer(room.gpa + 1024, 512)
        self.status = Buffer(room.gpa + 2048, 1)
        self.data = Buffer(room.gpa + 4096, length)
        memory.write(self.header.gpa, HEADER.pack(RequestType.IN, 0, 0))
        memory.write(self.status.gpa, b"\xff")
        memory.write(self.data.gpa, b"\xa5" * length)

    def table(self, *descriptors: tuple[int, int, int, int]) -> None:
        """Fill the indirect table."""
        for index, descriptor in enumerate(descriptors):
            self._guest.client.memory.write(self.tables.gpa + 16 * index, DESC.pack(*descriptor))

    def offer(self, head: int, expected: bytes) -> None:
        """Show the chain to the device, and look at what it did."""
        guest = self._guest
        driver, memory = guest.driver(), guest.client.memory
        position = driver.avail_idx
        driver.write_avail(position, head)
        driver.write_avail_idx(position + 1)
        guest.queue().kick()
        wanted = position + 1 & 0xFFFF
        guest.eventually(lambda: guest.used_idx() == wanted, "the request")
        status = memory.read(self.status)[0]
        expect(status == Status.OK, f"status {status_name(status)}")
        expect(memory.read(self.data) == expected, "other data was read")
        element = driver.gpa + driver.used_offset + 4 + 8 * (position & driver.size - 1)
        used = int.from_bytes(memory.read(Buffer(element, 4)), "little")
        expect(used == head, f"the used ring names chain {used}, not {head}")


CHECKS: tuple[Check, ...] = (*_DIRECT_CHECKS, *_INDIRECT_CHECKS, *collect(globals()))
