"""Images that rows of the matrix name: file name to the commands that make it, in a folder with the other ones.

Commands are run once; `poke FILE OFFSET HEX` overwrites bytes, `with FILE` says that the other file's commands make
both. A file that is named in another's commands comes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

__all__ = ["IMAGES"]

# Offsets in the header of qcow2.
_INCOMPATIBLE, _COMPATIBLE, _AUTOCLEAR = 72, 80, 88

_RAW = {
    "empty.raw": ["truncate -s 0 empty.raw"],
    "disk.raw": [
        "truncate -s 1M disk.raw",
        "qemu-io -f raw disk.raw -c 'write -P 1 64k 128k' -c 'write -P 2 1000k 4k'",
    ],
    "zeroes.raw": ["truncate -s 1M zeroes.raw"],
    "odd.raw": ["truncate -s 1000 odd.raw", "poke odd.raw 100 ff"],
    "short.raw": [
        "truncate -s 512k short.raw",
        "qemu-io -f raw short.raw -c 'write -P 1 64k 128k'",
    ],
    "text.raw": ["truncate -s 600 text.raw", "poke text.raw 0 68656c6c6f0a"],
    "with space.raw": ["cp disk.raw 'with space.raw'"],
    "a,b.raw": ["cp disk.raw a,b.raw"],
    "a:b.raw": ["cp disk.raw a:b.raw"],
    "ünïcode.raw": ["cp disk.raw ünïcode.raw"],
    "large.raw": ["truncate -s 1T large.raw"],
}

_QCOW2 = {
    "new.qcow2": ["qemu-img create -f qcow2 new.qcow2 1M"],
    "empty.qcow2": ["qemu-img create -f qcow2 empty.qcow2 0"],
    "v2.qcow2": [
        "qemu-img create -f qcow2 -o compat=0.10 v2.qcow2 1M",
        "qemu-io v2.qcow2 -c 'write -P 1 64k 128k'",
    ],
    "disk.qcow2": [
        "qemu-img create -f qcow2 disk.qcow2 1M",
        "qemu-io disk.qcow2 -c 'write -P 1 64k 128k' -c 'write -P 2 1000k 4k' -c 'write -z 512k 64k'",
    ],
    "base.qcow2": [
        "qemu-img create -f qcow2 base.qcow2 1M",
        "qemu-io base.qcow2 -c 'write -P 1 0 64k' -c 'write -P 2 256k 64k'",
    ],
    "mid.qcow2": [
        "qemu-img create -f qcow2 -b base.qcow2 -F qcow2 mid.qcow2",
        "qemu-io mid.qcow2 -c 'write -P 3 64k 64k'",
    ],
    "top.qcow2": [
        "qemu-img create -f qcow2 -b mid.qcow2 -F qcow2 top.qcow2",
        "qemu-io top.qcow2 -c 'write -P 4 128k 64k' -c 'write -z 0 64k'",
    ],
    "over-raw.qcow2": [
        "qemu-img create -f qcow2 -b disk.raw -F raw over-raw.qcow2",
        "qemu-io over-raw.qcow2 -c 'write -P 5 0 64k'",
    ],
    "unlabelled.qcow2": [
        "qemu-img create -f qcow2 -b base.qcow2 -F qcow2 unlabelled.qcow2",
        # The first extension of the header is the backing file's format: none from here on.
        "poke unlabelled.qcow2 112 0000000000000000",
    ],
    "orphan.qcow2": ["qemu-img create -u -f qcow2 -b nowhere.qcow2 -F qcow2 orphan.qcow2 1M"],
    "loop-a.qcow2": ["qemu-img create -u -f qcow2 -b loop-b.qcow2 -F qcow2 loop-a.qcow2 1M"],
    "loop-b.qcow2": ["qemu-img create -u -f qcow2 -b loop-a.qcow2 -F qcow2 loop-b.qcow2 1M"],
    "self.qcow2": ["qemu-img create -u -f qcow2 -b ./self.qcow2 -F qcow2 self.qcow2 1M"],
    "mislabelled.qcow2": ["qemu-img create -u -f qcow2 -b base.qcow2 -F raw mislabelled.qcow2 1M"],
    "small-clusters.qcow2": [
        "qemu-img create -f qcow2 -o cluster_size=512 small-clusters.qcow2 64k",
        "qemu-io small-clusters.qcow2 -c 'write -P 1 1k 3k'",
    ],
    "subclusters.qcow2": [
        "qemu-img create -f qcow2 -o extended_l2=on subclusters.qcow2 1M",
        "qemu-io subclusters.qcow2 -c 'write -P 1 2k 6k' -c 'write -z 10k 4k'",
    ],
    "compressed.qcow2": ["qemu-img convert -c -f raw -O qcow2 disk.raw compressed.qcow2"],
    "zstd.qcow2": [
        "qemu-img convert -c -f raw -O qcow2 -o compression_type=zstd disk.raw zstd.qcow2"
    ],
    "lazy.qcow2": ["qemu-img create -f qcow2 -o lazy_refcounts=on lazy.qcow2 1M"],
    "external.qcow2": [
        "qemu-img create -f qcow2 -o data_file=external.data external.qcow2 1M",
        "qemu-io external.qcow2 -c 'write -P 1 64k 64k'",
    ],
    "external.data": ["with external.qcow2"],
    "external-raw.qcow2": [
        "qemu-img create -f qcow2 -o data_file=external-raw.data,data_file_raw=on"
        " external-raw.qcow2 1M"
    ],
    "external-raw.data": ["with external-raw.qcow2"],
    "snapshots.qcow2": [
        "qemu-img create -f qcow2 snapshots.qcow2 1M",
        "qemu-io snapshots.qcow2 -c 'write -P 1 0 64k'",
        "qemu-img snapshot -c one snapshots.qcow2",
        "qemu-io snapshots.qcow2 -c 'write -P 2 0 64k'",
        "qemu-img snapshot -c two snapshots.qcow2",
    ],
    "bitmaps.qcow2": [
        "qemu-img create -f qcow2 bitmaps.qcow2 1M",
        "qemu-img bitmap --add bitmaps.qcow2 b0",
        "qemu-img bitmap --add -g 4k bitmaps.qcow2 b1",
        "qemu-io bitmaps.qcow2 -c 'write -P 1 64k 64k'",
        "qemu-img bitmap --disable bitmaps.qcow2 b1",
    ],
    "terabyte.qcow2": ["qemu-img create -f qcow2 terabyte.qcow2 1T"],
}

_DAMAGED = {
    "bad-magic.qcow2": ["cp disk.qcow2 bad-magic.qcow2", "poke bad-magic.qcow2 0 00"],
    "cut.qcow2": ["cp disk.qcow2 cut.qcow2", "truncate -s 60 cut.qcow2"],
    "cut-l1.qcow2": ["cp disk.qcow2 cut-l1.qcow2", "truncate -s 196608 cut-l1.qcow2"],
    "cut-data.qcow2": ["cp disk.qcow2 cut-data.qcow2", "truncate -s 330000 cut-data.qcow2"],
    "version.qcow2": ["cp disk.qcow2 version.qcow2", "poke version.qcow2 4 00000009"],
    "cluster-bits.qcow2": [
        "cp disk.qcow2 cluster-bits.qcow2",
        "poke cluster-bits.qcow2 20 00000008",
    ],
    "l1-size.qcow2": ["cp disk.qcow2 l1-size.qcow2", "poke l1-size.qcow2 36 00000000"],
    "l1-huge.qcow2": ["cp disk.qcow2 l1-huge.qcow2", "poke l1-huge.qcow2 36 7fffffff"],
    "l1-offset.qcow2": [
        "cp disk.qcow2 l1-offset.qcow2",
        "poke l1-offset.qcow2 40 0000000000030001",
    ],
    "refcount-order.qcow2": [
        "cp disk.qcow2 refcount-order.qcow2",
        "poke refcount-order.qcow2 96 00000007",
    ],
    "refcount-table.qcow2": [
        "cp disk.qcow2 refcount-table.qcow2",
        "poke refcount-table.qcow2 48 0000000000010001",
    ],
    "header-length.qcow2": [
        "cp disk.qcow2 header-length.qcow2",
        "poke header-length.qcow2 100 00000060",
    ],
    "feature.qcow2": [
        "cp disk.qcow2 feature.qcow2",
        f"poke feature.qcow2 {_INCOMPATIBLE} 0000010000000000",
    ],
    "compatible.qcow2": [
        "cp disk.qcow2 compatible.qcow2",
        f"poke compatible.qcow2 {_COMPATIBLE} 0000010000000000",
    ],
    "autoclear.qcow2": [
        "cp disk.qcow2 autoclear.qcow2",
        f"poke autoclear.qcow2 {_AUTOCLEAR} 0000010000000000",
    ],
    "dirty.qcow2": ["cp lazy.qcow2 dirty.qcow2", f"poke dirty.qcow2 {_INCOMPATIBLE + 7} 01"],
    "corrupt.qcow2": ["cp disk.qcow2 corrupt.qcow2", f"poke corrupt.qcow2 {_INCOMPATIBLE + 7} 02"],
    # The bitmap directory is at 0xf0000, the flags of the first bitmap 12 bytes behind: it is in use.
    "in-use.qcow2": ["cp bitmaps.qcow2 in-use.qcow2", "poke in-use.qcow2 0xf000f 03"],
    # The first entries of the refcount block (at 128k) are those of the header, the tables, and then the data.
    "leak.qcow2": [
        "cp disk.qcow2 leak.qcow2",
        "truncate -s 640k leak.qcow2",
        "poke leak.qcow2 0x20012 0001",
    ],
    "refcount-low.qcow2": [
        "cp disk.qcow2 refcount-low.qcow2",
        "poke refcount-low.qcow2 0x2000a 0000",
    ],
    "refcount-high.qcow2": [
        "cp disk.qcow2 refcount-high.qcow2",
        "poke refcount-high.qcow2 0x2000a 0003",
    ],
    "l2-misplaced.qcow2": [
        "cp disk.qcow2 l2-misplaced.qcow2",
        "poke l2-misplaced.qcow2 0x30000 8000000000040200",
    ],
    "l2-reserved.qcow2": [
        "cp disk.qcow2 l2-reserved.qcow2",
        "poke l2-reserved.qcow2 0x40008 8000000000050200",
    ],
    "l2-beyond.qcow2": [
        "cp disk.qcow2 l2-beyond.qcow2",
        "poke l2-beyond.qcow2 0x40008 8000000010000000",
    ],
}

IMAGES: Mapping[str, Sequence[str]] = MappingProxyType({**_RAW, **_QCOW2, **_DAMAGED})
