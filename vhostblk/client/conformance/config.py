"""Checks of the configuration space: its fields, how it is read, and the one byte that can be written.

vhost-user, VHOST_USER_GET_CONFIG and VHOST_USER_SET_CONFIG; VIRTIO 1.2 §5.2.4 and §5.2.5.
"""

from __future__ import annotations

from vhostblk.client.client import CONFIG_BYTES
from vhostblk.client.conformance.check import Check, Level, check, collect, expect
from vhostblk.client.conformance.rig import Rig
from vhostblk.errors import PeerError, SessionError
from vhostblk.vhost.message import ProtocolFeature
from vhostblk.virtio.blk import SECTOR, WRITEBACK_OFFSET, BlkConfig, RequestType, Status
from vhostblk.virtio.features import Feature

__all__ = ["CHECKS"]

_F = Feature
_CONFIG = ProtocolFeature.CONFIG
# Offset and size of every field that a driver may read by itself, in the first 60 bytes.
_FIELDS = (
    *((0, 8), (8, 4), (12, 4), (16, 2), (18, 1), (19, 1), (20, 4), (24, 1), (25, 1), (26, 2)),
    *((28, 4), (32, 1), (34, 2), (36, 4), (40, 4), (44, 4), (48, 4), (52, 4), (56, 1)),
)
_PADDING = ((33, 1), (57, 3))


@check(
    "config.whole",
    "the configuration space is answered with the offset and the size that were asked",
    "vhost-user, VHOST_USER_GET_CONFIG",
    protocol=_CONFIG,
)
def whole(rig: Rig) -> str:
    with rig.guest() as guest:
        for size in (CONFIG_BYTES, 36, 8):
            guest.control.get_config(0, size)
    return f"{CONFIG_BYTES}, 36 and 8 bytes"


@check(
    "config.fields-by-themselves",
    "every field can be read at its own offset",
    "vhost-user, VHOST_USER_GET_CONFIG",
    protocol=_CONFIG,
)
def fields_by_themselves(rig: Rig) -> str:
    with rig.guest() as guest:
        space = guest.control.get_config(0, CONFIG_BYTES)
        for offset, size in _FIELDS:
            found = guest.control.get_config(offset, size)
            wanted = space[offset : offset + size]
            expect(found == wanted, f"{size} bytes at {offset}: {found.hex()}, not {wanted.hex()}")
    return f"{len(_FIELDS)} fields"


@check(
    "config.beyond-the-end",
    "reading beyond the end gives an error or zeroes, and the session goes on",
    "vhost-user, VHOST_USER_GET_CONFIG",
    protocol=_CONFIG,
)
def beyond_the_end(rig: Rig) -> str:
    with rig.guest() as guest:
        said = []
        for offset, size in ((256 - 8, 8), (0, 256)):
            try:
                data = guest.control.get_config(offset, size)
            except SessionError:
                raise
            except PeerError:
                said.append("error")
            else:
                expect(not any(data[-8:]), f"{size} bytes at {offset} end in {data[-8:].hex()}")
                said.append("zeroes")
        expect(guest.control.is_alive(), "the session ended")
        return " and ".join(dict.fromkeys(said))


@check(
    "config.while-requests-run",
    "the configuration space can be read while requests are in flight",
    "VIRTIO 1.2 §2.5",
    protocol=_CONFIG,
)
def while_requests_run(rig: Rig) -> None:
    with rig.guest() as guest:
        for _ in range(10):
            pending = [guest.submit(RequestType.IN, 0, room=rig.block) for _ in range(16)]
            config = guest.client.read_config()
            expect(config.capacity == rig.offer.config.capacity, f"capacity {config.capacity}")
            guest.client.wait(pending)


@check("config.capacity", "the disk has a capacity", "VIRTIO 1.2 §5.2.5", protocol=_CONFIG)
def capacity(rig: Rig) -> str:
    expect(rig.capacity, "0 sectors")
    expect(
        rig.capacity % rig.block == 0,
        f"{rig.capacity} bytes are not a number of blocks of {rig.block}",
    )
    return f"{rig.offer.config.capacity} sectors"


@check(
    "config.size-max",
    "size_max allows a request at all",
    "VIRTIO 1.2 §5.2.3, §5.2.4",
    features=_F.VIRTIO_BLK_F_SIZE_MAX,
    protocol=_CONFIG,
)
def size_max(rig: Rig) -> str:
    found = rig.offer.config.size_max
    expect(found >= rig.block, f"offered with size_max {found}")
    return f"{found} bytes"


@check(
    "config.seg-max",
    "seg_max allows a request at all",
    "VIRTIO 1.2 §5.2.3, §5.2.4",
    features=_F.VIRTIO_BLK_F_SEG_MAX,
    protocol=_CONFIG,
)
def seg_max(rig: Rig) -> str:
    expect(rig.offer.config.seg_max, "offered with seg_max 0")
    return f"{rig.offer.config.seg_max} segments"


@check(
    "config.blk-size",
    "blk_size is a power of two, at least 512",
    "VIRTIO 1.2 §5.2.4",
    features=_F.VIRTIO_BLK_F_BLK_SIZE,
    protocol=_CONFIG,
)
def blk_size(rig: Rig) -> str:
    size = rig.offer.config.blk_size
    expect(size >= SECTOR and size & size - 1 == 0, f"blk_size {size}")
    return f"{size} bytes"


@check(
    "config.topology",
    "the topology is one that a disk can have",
    "VIRTIO 1.2 §5.2.4",
    features=_F.VIRTIO_BLK_F_TOPOLOGY,
    protocol=_CONFIG,
)
def topology(rig: Rig) -> str:
    config = rig.offer.config
    expect(config.physical_block_exp <= 16, f"physical_block_exp {config.physical_block_exp}")
    expect(
        config.alignment_offset < 1 << config.physical_block_exp,
        f"alignment_offset {config.alignment_offset} in a physical block of"
        f" {1 << config.physical_block_exp}",
    )
    physical = rig.block << config.physical_block_exp
    return f"physical block {physical}, min_io {config.min_io_size}, opt_io {config.opt_io_size}"


@check(
    "config.num-queues",
    "num_queues is not 0, and not more than GET_QUEUE_NUM says",
    "VIRTIO 1.2 §5.2.2, §5.2.4",
    features=_F.VIRTIO_BLK_F_MQ,
    protocol=_CONFIG,
)
def num_queues(rig: Rig) -> str:
    said = rig.offer.config.num_queues
    expect(0 < said <= rig.offer.queues, f"num_queues {said}, GET_QUEUE_NUM {rig.offer.queues}")
    return f"{said} queues"


@check(
    "config.padding",
    "the padding is zero",
    "VIRTIO 1.2 §5.2.5.2",
    protocol=_CONFIG,
)
def padding(rig: Rig) -> None:
    with rig.guest() as guest:
        space = guest.control.get_config(0, CONFIG_BYTES)
    for offset, size in _PADDING:
        expect(not any(space[offset : offset + size]), f"byte {offset}: {space[offset]:#x}")


@check(
    "config.discard-limits",
    "the limits of discards allow one",
    "VIRTIO 1.2 §5.2.4",
    features=_F.VIRTIO_BLK_F_DISCARD,
    protocol=_CONFIG,
)
def discard_limits(rig: Rig) -> str:
    config = rig.offer.config
    expect(config.max_discard_sectors, "max_discard_sectors 0")
    expect(config.max_discard_seg, "max_discard_seg 0")
    return f"{config.max_discard_seg} segments of {config.max_discard_sectors} sectors"


@check(
    "config.write-zeroes-limits",
    "the limits of write-zeroes allow one",
    "VIRTIO 1.2 §5.2.4",
    features=_F.VIRTIO_BLK_F_WRITE_ZEROES,
    protocol=_CONFIG,
)
def write_zeroes_limits(rig: Rig) -> str:
    config = rig.offer.config
    expect(config.max_write_zeroes_sectors, "max_write_zeroes_sectors 0")
    expect(config.max_write_zeroes_seg, "max_write_zeroes_seg 0")
    expect(config.write_zeroes_may_unmap < 2, f"may_unmap {config.write_zeroes_may_unmap}")
    return f"{config.max_write_zeroes_seg} segments of {config.max_write_zeroes_sectors} sectors"


@check(
    "config.writeback-initial",
    "writeback is 0 or 1",
    "VIRTIO 1.2 §5.2.5",
    features=_F.VIRTIO_BLK_F_CONFIG_WCE,
    protocol=_CONFIG,
)
def writeback_initial(rig: Rig) -> str:
    found = rig.offer.config.writeback
    expect(found in (0, 1), f"writeback {found}")
    # Nobody can see from here whether it is true.
    return "write-back" if found else "write-through: a guest will send no flushes"


@check(
    "config.writeback-without-flush",
    "writeback is 0 for a driver that took CONFIG_WCE and not FLUSH",
    "VIRTIO 1.2 §5.2.5.2",
    features=_F.VIRTIO_BLK_F_CONFIG_WCE,
    protocol=_CONFIG,
)
def writeback_without_flush(rig: Rig) -> None:
    with rig.guest(without=_F.VIRTIO_BLK_F_FLUSH) as guest:
        found = guest.client.read_config().writeback
        expect(found == 0, f"writeback {found}: the driver cannot flush")


@check(
    "config.writeback-toggled",
    "writeback can be set to 0 and to 1, and reads back so",
    "VIRTIO 1.2 §5.2.6.2; vhost-user, VHOST_USER_SET_CONFIG",
    features=_F.VIRTIO_BLK_F_CONFIG_WCE,
    protocol=_CONFIG,
)
def writeback_toggled(rig: Rig) -> None:
    with rig.guest() as guest:
        before = guest.client.read_config().writeback
        for wanted in (0, 1, 1, 0, before):
            guest.client.set_writeback(bool(wanted))
            found = guest.client.read_config().writeback
            expect(found == wanted, f"set to {wanted}, reads {found}")


@check(
    "config.writeback-both-modes",
    "writes and flushes work in both cache modes",
    "VIRTIO 1.2 §5.2.6.2",
    features=_F.VIRTIO_BLK_F_CONFIG_WCE | _F.VIRTIO_BLK_F_FLUSH,
    protocol=_CONFIG,
    writes=True,
)
def writeback_both_modes(rig: Rig) -> None:
    with rig.guest() as guest:
        before = guest.client.read_config().writeback
        for mode in (0, 1, before):
            guest.client.set_writeback(bool(mode))
            data = rig.pattern(rig.block)
            guest.write(0, data)
            guest.expect_status(guest.run(RequestType.FLUSH), Status.OK)
            expect(guest.read(0, rig.block) == data, f"writeback {mode}: other data was read")


@check(
    "config.only-writeback-is-writable",
    "a write to the capacity changes nothing",
    "VIRTIO 1.2 §5.2.5",
    protocol=_CONFIG | ProtocolFeature.REPLY_ACK,
)
def only_writeback_is_writable(rig: Rig) -> str:
    return _write_in_vain(rig, 0, (rig.offer.config.capacity + 8).to_bytes(8, "little"))


@check(
    "config.writeback-is-0-or-1",
    "a cache mode that does not exist is refused, or taken for one that does",
    "VIRTIO 1.2 §5.2.5",
    features=_F.VIRTIO_BLK_F_CONFIG_WCE,
    protocol=_CONFIG | ProtocolFeature.REPLY_ACK,
    level=Level.SHOULD,
)
def writeback_is_0_or_1(rig: Rig) -> str:
    with rig.guest() as guest:
        before = guest.client.read_config().writeback
        try:
            guest.control.set_config(WRITEBACK_OFFSET, b"\2")
        except SessionError:
            guest.client.abandon()
            return "ended the session"
        except PeerError:
            said = "refused"
        else:
            said = "taken"
        found = guest.client.read_config().writeback
        guest.client.set_writeback(bool(before))
        expect(found in (0, 1), f"writeback {found}")
        return said


def _write_in_vain(rig: Rig, offset: int, data: bytes) -> str:
    """Write what cannot be written; the space must be as before, for this front-end or the next one."""
    said = "ignored"
    with rig.guest() as guest:
        try:
            guest.ask(guest.control.frontend.set_config(offset, data))
        except SessionError:
            guest.client.abandon()
            said = "ended the session"
        except PeerError:
            said = "refused"
    with rig.guest() as guest:
        found = guest.control.get_config(0, CONFIG_BYTES)
    expect(
        BlkConfig.from_bytes(found) == rig.offer.config,
        f"{said}; bytes at {offset} are now {found[offset : offset + len(data)].hex()}",
    )
    return said


CHECKS: tuple[Check, ...] = collect(globals())
