"""Checks of requests: each type, what it answers, what it must not touch, where it has to refuse.

VIRTIO 1.2 §5.2.6. A driver must not ask for what lies beyond the capacity, and the like; a device
that is asked nevertheless answers with an error, because nothing else keeps a guest going.
"""

from __future__ import annotations

from vhostblk.client.client import segments
from vhostblk.client.conformance.check import Check, Level, check, collect, expect, skip
from vhostblk.client.conformance.guest import status_name
from vhostblk.client.conformance.rig import Rig
from vhostblk.client.queue import Framing
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import HEADER, ID_BYTES, SECTOR, RequestType, Status
from vhostblk.virtio.driver import Buffer
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS"]

_F = Feature
_CONFIG = ProtocolFeature.CONFIG
_OPERATION = "VIRTIO 1.2 §5.2.6"
_DEVICE = "VIRTIO 1.2 §5.2.6.2"
_IN, _OUT, _FLUSH = RequestType.IN, RequestType.OUT, RequestType.FLUSH
_LAST_SECTOR = 2**64 - 1


@check("request.read-first", "the first block can be read", _OPERATION)
def read_first(rig: Rig) -> None:
    with rig.guest() as guest:
        expect(
            guest.read(0, rig.block) == guest.read(0, rig.block), "two reads gave different data"
        )


@check("request.read-last", "the last block can be read", _OPERATION, protocol=_CONFIG)
def read_last(rig: Rig) -> str:
    with rig.guest() as guest:
        guest.read(rig.capacity - rig.block, rig.block)
    return f"sector {rig.last_sector}"


@check(
    "request.read-fills-its-buffer-only",
    "a read writes its data and its status, and not a byte beside them",
    "VIRTIO 1.2 §2.7.5, §5.2.6",
)
def read_fills_its_buffer_only(rig: Rig) -> str:
    with rig.guest() as guest:
        memory, length = guest.client.memory, rig.block
        expected = guest.read(0, length)
        room = memory.allocate(2 * length + 8192, alignment=4096)
        guard = b"\xee" * room.length
        header, data = Buffer(room.gpa + 24, HEADER.size), Buffer(room.gpa + 1001, length)
        status = Buffer(room.gpa + room.length - 77, 1)
        memory.write(room.gpa, guard)
        memory.write(header.gpa, HEADER.pack(_IN, 0, 0))
        guest.chain([header], [data, status])
        picture = bytearray(guard)
        for buffer, content in (
            (header, HEADER.pack(_IN, 0, 0)),
            (data, expected),
            (status, bytes([Status.OK])),
        ):
            start = buffer.gpa - room.gpa
            picture[start : start + buffer.length] = content
        found = memory.read(room)
        wrong = [i for i in range(room.length) if found[i] != picture[i]]
        inside = [i for i in wrong if 0 <= i - (data.gpa - room.gpa) < length]
        expect(found[-77] == Status.OK, f"status {status_name(found[-77])}")
        expect(not inside, f"{len(inside)} bytes of the data are wrong")
        expect(not wrong, f"{len(wrong)} bytes beside the buffers were changed")
    return "buffers at odd addresses"


@check(
    "request.many-segments",
    "a request with seg_max segments is served",
    "VIRTIO 1.2 §5.2.4, §5.2.6.1",
    features=_F.VIRTIO_BLK_F_SEG_MAX,
    protocol=_CONFIG,
)
def many_segments(rig: Rig) -> str:
    count = rig.offer.config.seg_max
    count = min(count, rig.span // rig.block, 1022)
    with rig.guest(queue_size=1024, without=_F.VIRTIO_F_INDIRECT_DESC) as guest:
        length = count * rig.block
        expected = b"".join(
            guest.read(start, min(64 << 10, length - start)) for start in range(0, length, 64 << 10)
        )
        memory = guest.client.memory
        header = memory.allocate(HEADER.size)
        memory.write(header.gpa, HEADER.pack(_IN, 0, 0))
        # Apart from each other, so that they are as many as they seem.
        pieces = [Buffer(memory.allocate(rig.block + 64).gpa, rig.block) for _ in range(count)]
        status = memory.allocate(1)
        memory.write(status.gpa, b"\xff")
        guest.chain([header], [*pieces, status])
        expect(memory.read(status) == b"\0", f"{count}: status {memory.read(status).hex()}")
        expect(b"".join(memory.read(piece) for piece in pieces) == expected, "other data was read")
    return f"{count} segments of {rig.block}"


@check(
    "request.longest-segment",
    "a segment of size_max bytes is served",
    "VIRTIO 1.2 §5.2.4, §5.2.6.1",
    features=_F.VIRTIO_BLK_F_SIZE_MAX,
    protocol=_CONFIG,
)
def longest_segment(rig: Rig) -> str:
    length = min(rig.offer.config.size_max, rig.span, 4 << 20) // rig.block * rig.block
    if not length:
        skip(f"size_max {rig.offer.config.size_max}")
    with rig.guest() as guest:
        guest.read(0, length)
    return f"{length} bytes"


@check("request.long-read", "a read of 1 MiB is served, and gives what short ones give", _OPERATION)
def long_read(rig: Rig) -> str:
    length = min(1 << 20, rig.span)
    limit = rig.offer.config.size_max
    with rig.guest() as guest:
        framing = None
        if rig.offer.features & _F.VIRTIO_BLK_F_SIZE_MAX and 0 < limit < length:
            length = min(length, limit * 64)
            framing = _pieces(limit)
        pending = guest.run(_IN, 0, room=length, framing=framing)
        guest.expect_status(pending, Status.OK)
        for start in range(0, length, 64 << 10):
            size = min(64 << 10, length - start)
            expect(
                guest.read(start, size) == pending.content[start : start + size],
                f"the {size} bytes at {start} differ",
            )
    return f"{length} bytes"


def _pieces(limit: int) -> Framing:
    return lambda n: [min(limit, n - start) for start in range(0, n, limit)]


@check("request.read-beyond", "reading behind the end fails with IOERR", _DEVICE, protocol=_CONFIG)
def read_beyond(rig: Rig) -> None:
    with rig.guest() as guest:
        for offset in (rig.capacity, rig.capacity + (1 << 40)):
            guest.expect_status(guest.run(_IN, offset, room=rig.block), Status.IOERR)


@check("request.read-across", "reading across the end fails with IOERR", _DEVICE, protocol=_CONFIG)
def read_across(rig: Rig) -> None:
    with rig.guest() as guest:
        pending = guest.run(_IN, rig.capacity - rig.block, room=2 * rig.block)
        guest.expect_status(pending, Status.IOERR)


@check(
    "request.read-overflow",
    "sector numbers that overflow fail with IOERR",
    _DEVICE,
    protocol=_CONFIG,
)
def read_overflow(rig: Rig) -> None:
    with rig.guest() as guest:
        for sector in (_LAST_SECTOR, 2**55, 2**63, 2**64 - 8):
            pending = guest.run(_IN, sector * SECTOR, room=8 * SECTOR)
            guest.expect_status(pending, Status.IOERR, what=f"sector {sector:#x}")


@check(
    "request.read-part-of-a-sector",
    "a read that is not made of sectors is answered, and not with success",
    "VIRTIO 1.2 §5.2.6.1",
)
def read_part_of_a_sector(rig: Rig) -> None:
    with rig.guest() as guest:
        for room in (1, 100, SECTOR - 1, SECTOR + 1):
            pending = guest.run(_IN, 0, room=room)
            expect(pending.status != Status.OK, f"{room} bytes: status OK")


@check(
    "request.read-nothing",
    "a read of no bytes is answered, and has no data",
    "VIRTIO 1.2 §5.2.6",
)
def read_nothing(rig: Rig) -> str:
    with rig.guest() as guest:
        pending = guest.run(_IN, 0)
        expect(pending.status in set(Status), f"status {pending.status}")
        return f"status {status_name(pending.status)}"


@check("request.flush", "a flush succeeds", _OPERATION, features=_F.VIRTIO_BLK_F_FLUSH)
def flush(rig: Rig) -> None:
    with rig.guest() as guest:
        for _ in range(3):
            guest.expect_status(guest.run(_FLUSH), Status.OK)


@check("request.get-id", "GET_ID gives 20 bytes", _OPERATION)
def get_id(rig: Rig) -> str:
    with rig.guest() as guest:
        pending = guest.run(RequestType.GET_ID, room=ID_BYTES)
        guest.expect_status(pending, Status.OK)
        text, _, rest = pending.content.partition(b"\0")
        expect(not rest.strip(b"\0"), f"{rest!r} behind the string's end")
        return repr(text.decode("ascii", "backslashreplace"))


@check(
    "request.unknown-type",
    "request types that do not exist fail with UNSUPP",
    _OPERATION,
)
def unknown_type(rig: Rig) -> None:
    with rig.guest() as guest:
        for kind in (77, 2**30, 2**32 - 1):
            guest.expect_status(guest.run(kind, room=SECTOR), Status.UNSUPP)


@check(
    "request.lifetime-not-offered",
    "GET_LIFETIME fails with UNSUPP where it is not offered",
    _OPERATION,
    without=_F.VIRTIO_BLK_F_LIFETIME,
)
def lifetime_not_offered(rig: Rig) -> None:
    with rig.guest() as guest:
        guest.expect_status(guest.run(RequestType.GET_LIFETIME, room=SECTOR), Status.UNSUPP)


@check(
    "request.used-length-bound",
    "the used length is never more than the device was given to write",
    "VIRTIO 1.2 §2.7.8.2",
)
def used_length_bound(rig: Rig) -> None:
    with rig.guest() as guest:
        for kind, sector, room in (
            (_IN, 0, rig.block),
            (_IN, 0, 8 * rig.block),
            (_IN, rig.last_sector + 1, rig.block),
            (RequestType.GET_ID, 0, ID_BYTES),
            (_FLUSH, 0, 0),
            (77, 0, 0),
        ):
            pending = guest.run(kind, sector * SECTOR, room=room)
            expect(
                pending.written <= room + 1,
                f"type {kind} with room for {room + 1}: used length {pending.written}",
            )


@check(
    "request.used-length-exact",
    "the used length is the data that was written, and the status",
    "VIRTIO 1.2 §2.7.8.2",
    level=Level.SHOULD,
)
def used_length_exact(rig: Rig) -> None:
    with rig.guest() as guest:
        for kind, room in ((_IN, rig.block), (_IN, 8 * rig.block), (RequestType.GET_ID, ID_BYTES)):
            pending = guest.run(kind, room=room)
            expect(
                pending.written == room + 1,
                f"type {kind} wrote {room + 1}: used length {pending.written}",
            )


@check(
    "request.out-of-order",
    "requests in flight may finish in any order, each with its own data",
    "VIRTIO 1.2 §2.7.8, §5.2.6",
)
def out_of_order(rig: Rig) -> str:
    with rig.guest() as guest:
        places = [i * rig.block for i in range(min(64, rig.span // rig.block))]
        expected = [guest.read(place, rig.block) for place in places]
        disorder, long = 0, 16 * rig.block
        for _ in range(5):
            # Every fourth one is longer, where there is room: it may be overtaken.
            pending = [
                guest.submit(
                    _IN, place, room=long if i % 4 == 0 and place + long <= rig.span else rig.block
                )
                for i, place in enumerate(places)
            ]
            finished = guest.client.wait(pending)
            order = [pending.index(p) for p in finished]
            disorder += order != sorted(order)
            for place, one, wanted in zip(places, pending, expected, strict=True):
                guest.expect_status(one, Status.OK)
                expect(one.content[: rig.block] == wanted, f"other data at {place}")
    return f"{disorder} of 5 batches out of order"


@check("request.read-only-refuses", "a read-only disk refuses to be changed with IOERR", _DEVICE,
       features=_F.VIRTIO_BLK_F_RO, writes=True)  # fmt: skip
def read_only_refuses(rig: Rig) -> None:
    with rig.guest() as guest:
        before = guest.read(0, rig.block)
        pending = guest.run(_OUT, 0, out=bytes(255 - byte for byte in before))
        guest.expect_status(pending, Status.IOERR)
        for kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
            pending = guest.run(kind, out=segments([(0, rig.block)]))
            guest.expect_status(pending, Status.IOERR, Status.UNSUPP)
        expect(guest.read(0, rig.block) == before, "the disk was changed")


CHECKS: tuple[Check, ...] = collect(globals())
