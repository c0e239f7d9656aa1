"""Rows of `resize`."""

from __future__ import annotations

from tests.differential.img_matrix import rows

ROWS = (
    *rows("""
        resize
        resize disk.raw
        resize -f raw
        resize disk.raw 2M more 3M
        resize -f raw disk.raw 2M
        resize disk.raw 2M
        resize -q -f raw disk.raw 2M
        resize -f raw disk.raw +1M
        resize -f raw disk.raw -512k
        resize -f raw --shrink disk.raw -512k
        resize -f raw disk.raw 512k
        resize -f raw --shrink disk.raw 512k
        resize -f raw disk.raw 1M
        resize -f raw --shrink disk.raw -2M
        resize -f raw --shrink disk.raw -1M
        resize -f raw disk.raw 0
        resize -f raw disk.raw +0
        resize -f raw disk.raw 1000000
        resize -f raw disk.raw +1
        resize -f raw disk.raw +1000
        resize -f raw --shrink disk.raw -1
        resize -f raw disk.raw foo
        resize -f raw disk.raw ''
        resize -f raw disk.raw +
        resize -f raw disk.raw --1M
        resize -f raw disk.raw ++1M
        resize -f raw disk.raw 1.5M
        resize -f raw disk.raw 16E
        resize -f raw disk.raw 15E
        resize -f raw disk.raw 8E
        resize -f raw disk.raw 7E
        resize -f raw disk.raw +7E
        resize -f raw odd.raw +1M
        resize -f raw empty.raw 1M
        resize disk.qcow2 2M
        resize disk.qcow2 +512
        resize disk.qcow2 +1
        resize disk.qcow2 1000000
        resize disk.qcow2 512k
        resize --shrink disk.qcow2 512k
        resize --shrink disk.qcow2 -1023k
        resize -f raw disk.qcow2 10M
        resize -f qcow2 disk.raw 10M
        resize -f nosuch disk.raw 10M
        resize nosuch 10M
        resize . 10M
        resize top.qcow2 2M
        resize orphan.qcow2 2M
        resize v2.qcow2 2M
        resize external.qcow2 2M
        resize external-raw.qcow2 2M
        resize --shrink external.qcow2 512k
        resize snapshots.qcow2 2M
        resize --shrink snapshots.qcow2 512k
        resize bitmaps.qcow2 2M
        resize --shrink bitmaps.qcow2 512k
        resize disk.qcow2 2P
        resize disk.qcow2 7E
        resize small-clusters.qcow2 1T
        resize bad-magic.qcow2 2M
        resize corrupt.qcow2 2M
        resize dirty.qcow2 2M
    """),
    *rows("""
        resize -f raw --preallocation=off disk.raw 2M
        resize -f raw --preallocation=falloc disk.raw 2M
        resize -f raw --preallocation=full disk.raw 2M
        resize -f raw --preallocation=metadata disk.raw 2M
        resize -f raw --preallocation=what disk.raw 2M
        resize -f raw --preallocation disk.raw 2M
        resize -f raw --preallocation=full disk.raw 1M
        resize -f raw --preallocation=full --shrink disk.raw 512k
        resize --preallocation=metadata disk.qcow2 2M
        resize --preallocation=metadata top.qcow2 2M
        resize --preallocation=metadata external.qcow2 2M
        resize --image-opts driver=raw,file.filename=disk.raw 2M
        resize --image-opts driver=qcow2,file.filename=disk.qcow2 2M
        resize --image-opts -f raw driver=raw,file.filename=disk.raw 2M
        resize --image-opts disk.raw 2M
        resize --image-opts driver=raw,file.filename=disk.raw,size=512k 2M
        resize --image-opts driver=raw,file.filename=disk.raw,read-only=on 2M
    """),
    *rows(
        """
        resize --preallocation=falloc disk.qcow2 2M
        resize --preallocation=full disk.qcow2 2M
        """,
        differs="what is allocated is in one piece",
    ),
    *rows(
        "resize -f raw disk.raw 2M",
        held="qemu-io -f raw disk.raw",
        differs="a file that another process writes is not written",
    ),
    *rows(
        "resize --image-opts driver=null-co,size=1M 2M", differs="null-co can be as long as wanted"
    ),
)
