"""How large a qcow2 image gets, and whether it takes less room than it seems to (block layer rows B31.6 and B21.9).

All tables of an image that is written completely are counted, whatever of its data is: this is an upper limit, as it is
in QEMU.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable

from vhostblk.block.dirty_bitmap import DirtyBitmap
from vhostblk.block.drivers.qcow2.bitmaps import bytes_needed
from vhostblk.block.drivers.qcow2.create import (
    check_cluster_size,
    check_refcount_bits,
    version_type,
)
from vhostblk.block.drivers.qcow2.encryption_options import NewEncryption
from vhostblk.block.drivers.qcow2.header import MAX_L1_BYTES
from vhostblk.block.drivers.qcow2.layout import Layout
from vhostblk.block.flags import StatusFlag
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.block.length import Measurement
from vhostblk.block.limits import align_down, align_up
from vhostblk.block.node import BlockNode
from vhostblk.block.options import BOOLEAN, INTEGER, SIZE, STRING, choice, option
from vhostblk.block.status import status_above
from vhostblk.errors import ConfigError

_HAS_DATA = StatusFlag.DATA | StatusFlag.ALLOCATED


@lean_dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2MeasureOptions(NewEncryption):
    """Those of new images that make a difference, in the order in which they are looked at."""

    cluster_size: int = option(SIZE, 65536, name="cluster_size", about="bytes of a cluster")
    extended_l2: bool = option(BOOLEAN, False, name="extended_l2", about="extended L2 tables")
    compat: int = option(
        version_type("Invalid compatibility level: '{}'"), 3, about="version of the format"
    )
    refcount_bits: int = option(
        INTEGER, 16, name="refcount_bits", about="width of a reference count"
    )
    preallocation: str = option(
        choice("off", "metadata", "falloc", "full"), "off", about="what gets its place at once"
    )
    backing_file: str | None = option(STRING, None, name="backing_file", about="what is below")
    size: int = option(SIZE, about="bytes of the disk")

    def __post_init__(self) -> None:
        check_cluster_size(self.cluster_size, extended_l2=self.extended_l2)
        check_refcount_bits(self.refcount_bits)
        if self.compat < 3 and self.refcount_bits != 16:
            raise ConfigError(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above "
                "(use compat=1.1 or greater)"
            )
        if self.encrypt_format == "luks":
            self.luks.check()
            if self.encrypt_key_secret is None:
                raise ConfigError("Parameter 'encrypt.key-secret' is required for cipher")


async def measure(options: Qcow2MeasureOptions, source: BlockNode | None) -> Measurement:
    """What an image with these options takes.

    Raises:
        ConfigError: EFBIG: there is no such image.
        BlockError: the source cannot be looked at.
    """
    layout = Layout(
        size=options.size,
        cluster_size=options.cluster_size,
        refcount_order=options.refcount_bits.bit_length() - 1,
        l2_entry_size=16 if options.extended_l2 else 8,
        preallocated=True,
    )
    if layout.l1_entries * 8 > MAX_L1_BYTES:
        raise ConfigError("Active L1 table too large", errno.EFBIG)
    disk = layout.guest_clusters * layout.cluster_size
    data, bitmaps = 0, None
    if options.preallocation in ("falloc", "full") or (source and options.backing_file is not None):
        # What the new image shares with its backing file nobody knows.
        data = disk
    elif source is not None:
        data = await _data_of(source, layout.cluster_size)
    if source is not None and options.compat >= 3:
        bitmaps = await source.driver_bitmap_room(layout.cluster_size)
    keys = 0
    if options.encrypt_format == "luks":
        keys = align_up(options.luks.payload_bytes, layout.cluster_size)
    return Measurement(keys + layout.end - disk + data, keys + layout.end, bitmaps)


async def _data_of(source: BlockNode, cluster_size: int) -> int:
    """Bytes of clusters that have something else than zeroes."""
    data = at = 0
    while at < source.length:
        status = await status_above(source, None, at, source.length - at)
        end = at + status.length
        if not status.flags & StatusFlag.ZERO and status.flags & _HAS_DATA == _HAS_DATA:
            end = align_up(end, cluster_size)
            data += end - align_down(at, cluster_size)
        at = end
    return data


def bitmap_room(bitmaps: Iterable[DirtyBitmap], length: int, cluster_size: int) -> int:
    """What the bitmaps of a disk take that are kept in its image, if none of their bits are alike."""
    total = entries = 0
    for bitmap in bitmaps:
        if bitmap.persistent and not bitmap.inconsistent:
            clusters = -(-bytes_needed(length, bitmap.granularity) // cluster_size)
            total += clusters * cluster_size + align_up(clusters * 8, cluster_size)
            name = (bitmap.name or "").encode(errors="surrogateescape")
            entries += align_up(24 + len(name), 8)
    return total + align_up(entries, cluster_size)
