"""Checks of requests that change the disk: writes, discards, zeroes, and the limits of each.

VIRTIO 1.2 §5.2.6. All of them overwrite the start of the disk, or its last block.
"""

from __future__ import annotations

from vhostblk.client.client import segments
from vhostblk.client.conformance.check import Check, check, collect, expect, skip
from vhostblk.client.conformance.guest import Guest
from vhostblk.client.conformance.rig import Rig
from vhostblk.virtio.blk import SECTOR, SEGMENT, SEGMENT_F_UNMAP, RequestType, Status
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS"]

_F = Feature
_OPERATION = "VIRTIO 1.2 §5.2.6"
_DEVICE = "VIRTIO 1.2 §5.2.6.2"
_LIMITS = "VIRTIO 1.2 §5.2.4, §5.2.6.1"
_OUT, _DISCARD, _ZERO = RequestType.OUT, RequestType.DISCARD, RequestType.WRITE_ZEROES
_F_DISCARD, _F_ZERO = _F.VIRTIO_BLK_F_DISCARD, _F.VIRTIO_BLK_F_WRITE_ZEROES
_KINDS = ((_DISCARD, _F_DISCARD), (_ZERO, _F_ZERO))


@check("write.reads-back", "what was written is read", _OPERATION, writes=True)
def reads_back(rig: Rig) -> None:
    with rig.guest() as guest:
        for offset, length in ((0, rig.block), (rig.block, 7 * rig.block), (64 << 10, 256 << 10)):
            if offset + length > rig.span:
                break
            data = rig.pattern(length)
            guest.write(offset, data)
            expect(guest.read(offset, length) == data, f"{length} bytes at {offset} differ")


@check("write.neighbours", "a write changes nothing beside it", _OPERATION, writes=True)
def neighbours(rig: Rig) -> None:
    with rig.guest() as guest:
        before, data = rig.pattern(8 * rig.block), rig.pattern(2 * rig.block)
        guest.write(0, before)
        guest.write(3 * rig.block, data)
        expected = before[: 3 * rig.block] + data + before[5 * rig.block :]
        expect(guest.read(0, 8 * rig.block) == expected, "other data was read")


@check("write.last-block", "the last block can be written", _OPERATION, writes=True)
def last_block(rig: Rig) -> None:
    with rig.guest() as guest:
        data, offset = rig.pattern(rig.block), rig.capacity - rig.block
        guest.write(offset, data)
        expect(guest.read(offset, rig.block) == data, "other data was read")


@check(
    "write.beyond",
    "writing behind or across the end fails with IOERR, and writes nothing",
    _DEVICE,
    writes=True,
)
def beyond(rig: Rig) -> None:
    with rig.guest() as guest:
        last = rig.capacity - rig.block
        data = rig.pattern(2 * rig.block)
        before = guest.read(last, rig.block)
        for offset in (last, rig.capacity, (2**64 - 1) * SECTOR, 2**55 * SECTOR):
            guest.expect_status(guest.run(_OUT, offset, out=data), Status.IOERR)
        expect(guest.read(last, rig.block) == before, "the last block was changed")


@check(
    "write.part-of-a-sector",
    "a write that is not made of sectors is answered, and not with success",
    "VIRTIO 1.2 §5.2.6.1",
    writes=True,
)
def part_of_a_sector(rig: Rig) -> None:
    with rig.guest() as guest:
        for length in (1, 100, SECTOR - 1, SECTOR + 1):
            pending = guest.run(_OUT, 0, out=b"x" * length)
            expect(pending.status != Status.OK, f"{length} bytes: status OK")


@check("write.long", "a write of 1 MiB is served", _OPERATION, writes=True)
def long(rig: Rig) -> str:
    length = min(1 << 20, rig.span)
    if rig.offer.features & _F.VIRTIO_BLK_F_SIZE_MAX:
        length = min(length, max(rig.offer.config.size_max, rig.block))
    data = rig.pattern(length)
    with rig.guest() as guest:
        guest.write(0, data)
        expect(guest.read(0, length) == data, "other data was read")
    return f"{length} bytes"


@check(
    "write.many-segments",
    "a write with seg_max segments is served",
    _LIMITS,
    features=_F.VIRTIO_BLK_F_SEG_MAX,
    writes=True,
)
def many_segments(rig: Rig) -> str:
    count = min(rig.offer.config.seg_max, rig.span // rig.block, 1022)

    def cut(length: int) -> list[int]:
        """Header and status apart, the data in blocks."""
        if length == 1:
            return [1]
        return [16, *[rig.block] * ((length - 16) // rig.block)]

    with rig.guest(queue_size=1024, without=_F.VIRTIO_F_INDIRECT_DESC) as guest:
        data = rig.pattern(count * rig.block)
        pending = guest.run(_OUT, 0, out=data, framing=cut)
        guest.expect_status(pending, Status.OK)
        expect(guest.read(0, len(data)) == data, "other data was read")
    return f"{count} segments of {rig.block}"


@check("write.used-length", "a write gives back a used length of 1: the status",
       "VIRTIO 1.2 §2.7.8.2", writes=True)  # fmt: skip
def used_length(rig: Rig) -> None:
    with rig.guest() as guest:
        for length in (rig.block, 8 * rig.block):
            pending = guest.run(_OUT, 0, out=rig.pattern(length))
            expect(pending.written <= 1, f"{length} bytes written: used length {pending.written}")


@check(
    "write.then-flush",
    "writes, a flush and a read of the same blocks, many times",
    _OPERATION,
    features=_F.VIRTIO_BLK_F_FLUSH,
    writes=True,
)
def then_flush(rig: Rig) -> None:
    with rig.guest() as guest:
        for i in range(20):
            data = rig.pattern(rig.block)
            offset = i * rig.block
            guest.write(offset, data)
            guest.expect_status(guest.run(RequestType.FLUSH), Status.OK)
            expect(guest.read(offset, rig.block) == data, f"other data at {offset}")


@check("discard.works", "a discard succeeds, and leaves its neighbours alone", _OPERATION,
       features=_F_DISCARD, writes=True)  # fmt: skip
def discard_works(rig: Rig) -> str:
    with rig.guest() as guest:
        unit = _discard_unit(rig)
        before = rig.pattern(3 * unit)
        guest.write(0, before)
        guest.expect_status(guest.run(_DISCARD, out=segments([(unit, unit)])), Status.OK)
        after = guest.read(0, 3 * unit)
        expect(after[:unit] + after[2 * unit :] == before[:unit] + before[2 * unit :], "neighbours")
        return (
            f"{unit} bytes, read back as {'zeroes' if not any(after[unit : 2 * unit]) else 'data'}"
        )


def _discard_unit(rig: Rig) -> int:
    """Bytes of the shortest discard that has to be served."""
    unit = max(rig.offer.config.discard_sector_alignment * SECTOR, rig.block)
    if 3 * unit > rig.span:
        skip(f"aligned to {unit} bytes")
    return unit


@check(
    "discard.segments",
    "a discard of max_discard_seg segments succeeds, one of more fails with UNSUPP or IOERR",
    _LIMITS,
    features=_F_DISCARD,
    writes=True,
)
def discard_segments(rig: Rig) -> str:
    return _segments(rig, _DISCARD, rig.offer.config.max_discard_seg, _discard_unit(rig))


@check(
    "discard.longest",
    "a segment of max_discard_sectors is served",
    _LIMITS,
    features=_F_DISCARD,
    writes=True,
)
def discard_longest(rig: Rig) -> str:
    return _longest(rig, _DISCARD, rig.offer.config.max_discard_sectors, _discard_unit(rig))


@check(
    "discard.beyond",
    "a discard beyond the end fails with IOERR",
    _DEVICE,
    features=_F_DISCARD,
    writes=True,
)
def discard_beyond(rig: Rig) -> None:
    _beyond(rig, _DISCARD)


@check(
    "discard.unmap-flag",
    "a discard with the unmap flag fails with UNSUPP, and discards nothing",
    _DEVICE,
    features=_F_DISCARD,
    writes=True,
)
def discard_unmap_flag(rig: Rig) -> None:
    _flags(rig, _DISCARD, (SEGMENT_F_UNMAP,))


@check(
    "discard.unknown-flags",
    "a discard with an unknown flag fails with UNSUPP, and discards nothing",
    _DEVICE,
    features=_F_DISCARD,
    writes=True,
)
def discard_unknown_flags(rig: Rig) -> None:
    _flags(rig, _DISCARD, (2, 1 << 31))


@check("zeroes.works", "write-zeroes makes zeroes, and leaves its neighbours alone", _DEVICE,
       features=_F_ZERO, writes=True)  # fmt: skip
def zeroes_works(rig: Rig) -> None:
    _zero(rig, 0)


@check(
    "zeroes.unmap",
    "write-zeroes with the unmap flag makes zeroes",
    _DEVICE,
    features=_F_ZERO,
    writes=True,
)
def zeroes_unmap(rig: Rig) -> str:
    _zero(rig, SEGMENT_F_UNMAP)
    return f"may_unmap {rig.offer.config.write_zeroes_may_unmap}"


def _zero(rig: Rig, flags: int) -> None:
    block = rig.block
    with rig.guest() as guest:
        # One block, and a range that no file system's block is aligned to.
        for first, count in ((1, 1), (3, 17)):
            before = rig.pattern((count + 6) * block)
            guest.write(0, before)
            out = segments([(first * block, count * block)], flags=flags)
            guest.expect_status(guest.run(_ZERO, out=out), Status.OK)
            end = first + count
            expected = before[: first * block] + bytes(count * block) + before[end * block :]
            expect(guest.read(0, len(before)) == expected, f"blocks {first} to {end}: other data")


@check(
    "zeroes.segments",
    "max_write_zeroes_seg segments are served, more fail with UNSUPP or IOERR",
    _LIMITS,
    features=_F_ZERO,
    writes=True,
)
def zeroes_segments(rig: Rig) -> str:
    return _segments(rig, _ZERO, rig.offer.config.max_write_zeroes_seg, rig.block)


@check(
    "zeroes.longest",
    "a segment of max_write_zeroes_sectors is served",
    _LIMITS,
    features=_F_ZERO,
    writes=True,
)
def zeroes_longest(rig: Rig) -> str:
    return _longest(rig, _ZERO, rig.offer.config.max_write_zeroes_sectors, rig.block)


@check(
    "zeroes.beyond",
    "write-zeroes beyond the end fails with IOERR",
    _DEVICE,
    features=_F_ZERO,
    writes=True,
)
def zeroes_beyond(rig: Rig) -> None:
    _beyond(rig, _ZERO)


@check(
    "zeroes.unknown-flags",
    "write-zeroes with an unknown flag fails with UNSUPP, and zeroes nothing",
    _DEVICE,
    features=_F_ZERO,
    writes=True,
)
def zeroes_unknown_flags(rig: Rig) -> None:
    _flags(rig, _ZERO, (2, 1 << 31, SEGMENT_F_UNMAP | 2))


@check(
    "discard.malformed",
    "ranges that are not made of whole segments fail",
    "VIRTIO 1.2 §5.2.6",
    writes=True,
    features=_F_DISCARD,
)
def malformed(rig: Rig) -> None:
    with rig.guest() as guest:
        before = _known(rig, guest)
        for kind, feature in _KINDS:
            if not rig.offer.features & feature:
                continue
            for length in (0, 8, 24):
                pending = guest.run(kind, out=SEGMENT.pack(0, 1, 0).ljust(24, b"\0")[:length])
                expect(pending.status != Status.OK, f"{kind.name} with {length} bytes: status OK")
        expect(guest.read(0, len(before)) == before, "the disk was changed")


@check(
    "request.secure-erase-not-offered",
    "SECURE_ERASE fails with UNSUPP where it is not offered",
    _OPERATION,
    without=_F.VIRTIO_BLK_F_SECURE_ERASE,
    writes=True,
)
def secure_erase_not_offered(rig: Rig) -> None:
    with rig.guest() as guest:
        before = _known(rig, guest)
        pending = guest.run(RequestType.SECURE_ERASE, out=segments([(0, rig.block)]))
        guest.expect_status(pending, Status.UNSUPP)
        expect(guest.read(0, len(before)) == before, "the disk was changed")


# ---------------------------------------------------------------- what discards and zeroes share


def _known(rig: Rig, guest: Guest) -> bytes:
    data = rig.pattern(8 * rig.block)
    guest.write(0, data)
    return data


def _segments(rig: Rig, kind: RequestType, most: int, unit: int) -> str:
    count = min(most, rig.span // (2 * unit), 1024)
    with rig.guest() as guest:
        data = rig.pattern(unit)
        for i in {0, count - 1}:
            guest.write(2 * i * unit, data + data)
        ranges = [(2 * i * unit, unit) for i in range(count)]
        guest.expect_status(guest.run(kind, out=segments(ranges)), Status.OK)
        for i in {0, count - 1}:
            found = guest.read(2 * i * unit, 2 * unit)
            expect(found[unit:] == data, f"behind segment {i}: other data")
            if kind == _ZERO:
                expect(not any(found[:unit]), f"segment {i} is not zero")
        if most <= 1024:
            pending = guest.run(kind, out=segments([(0, unit)] * (most + 1)))
            guest.expect_status(
                pending, Status.UNSUPP, Status.IOERR, what=f"{kind.name} of {most + 1} segments"
            )
    return f"{count} of {most} segments"


def _longest(rig: Rig, kind: RequestType, most: int, unit: int) -> str:
    length = min(most * SECTOR, rig.span) // unit * unit
    if not length:
        skip(f"at most {most} sectors")
    with rig.guest() as guest:
        guest.write(length - rig.block, rig.pattern(rig.block))
        guest.expect_status(guest.run(kind, out=segments([(0, length)])), Status.OK)
        if kind == _ZERO:
            for start in (0, length - rig.block):
                expect(not any(guest.read(start, rig.block)), f"not zero at {start}")
    bounded = "" if length == most * SECTOR else f" of {most}: the range to overwrite has no more"
    return f"{length // SECTOR} sectors{bounded}"


def _beyond(rig: Rig, kind: RequestType) -> None:
    with rig.guest() as guest:
        data, last = rig.pattern(rig.block), rig.capacity - rig.block
        guest.write(last, data)
        sector, count = rig.capacity // SECTOR, rig.block // SECTOR
        for first, number in (
            (sector, count),
            (sector - count, 2 * count),
            (2**64 - 1, 1),
            (2**64 - count, 2 * count),
            (2**55, count),
        ):
            pending = guest.run(kind, out=SEGMENT.pack(first, number, 0))
            what = f"{kind.name} of {number} sectors at {first:#x}"
            guest.expect_status(pending, Status.IOERR, what=what)
        expect(guest.read(last, rig.block) == data, "the last block was changed")


def _flags(rig: Rig, kind: RequestType, all_flags: tuple[int, ...]) -> None:
    with rig.guest() as guest:
        before = _known(rig, guest)
        for flags in all_flags:
            pending = guest.run(kind, out=segments([(0, 8 * rig.block)], flags=flags))
            what = f"{kind.name} with flags {flags:#x}"
            guest.expect_status(pending, Status.UNSUPP, what=what)
        expect(guest.read(0, len(before)) == before, "the disk was changed")


CHECKS: tuple[Check, ...] = collect(globals())
