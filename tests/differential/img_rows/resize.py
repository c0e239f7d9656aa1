"""Rows of `resize`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    *rows("""
        resize empty.qcow2 +1M
        resize --preallocation=full empty.qcow2 70000128
        resize --preallocation=metadata empty.qcow2 70000128
        resize empty.qcow2 0
        resize --shrink empty.qcow2 -512
        resize empty.qcow2 64P
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
    *rows("""
        resize --preallocation=falloc disk.qcow2 2M
        resize --preallocation=full disk.qcow2 2M
    """),
    *rows(
        "resize -f raw disk.raw 2M",
        held="qemu-io -f raw disk.raw",
        differs="a file that another process writes is not written",
    ),
    *rows(
        "resize --image-opts driver=null-co,size=1M 2M", differs="null-co can be as long as wanted"
    ),
    # Option by option, as the manual has them.
    *rows("""
        resize disk.qcow2
        resize 2M
        resize -q disk.qcow2 2M
        resize -f qcow2 disk.qcow2 2M
        resize disk.qcow2 2M 3M
        resize disk.qcow2 +1M
        resize disk.qcow2 +0
        resize disk.qcow2 1M
        resize -q disk.qcow2 1M
        resize disk.qcow2 -- -512k
        resize disk.qcow2 -512k
        resize --shrink disk.qcow2 -512k
        resize --shrink -q disk.qcow2 512k
        resize --shrink disk.qcow2 0
        resize --shrink disk.qcow2 -1M
        resize --shrink disk.qcow2 -2M
        resize --shrink disk.qcow2 2M
        resize --shrink disk.qcow2 1
        resize disk.qcow2 1000001
        resize disk.qcow2 1048577
        resize disk.qcow2 +513
        resize disk.qcow2 x
        resize disk.qcow2 ''
        resize disk.qcow2 +
        resize disk.qcow2 -
        resize disk.qcow2 1.5M
        resize disk.qcow2 2m
        resize disk.qcow2 1T
        resize disk.qcow2 1P
        resize disk.qcow2 8E
        resize disk.qcow2 99999999999999999999
        resize -f raw --shrink disk.raw 0
        resize -f raw --shrink disk.raw 1
        resize -f raw odd.raw +512
        resize -f raw disk.qcow2 2M
        resize -f qcow2 disk.raw 2M
        resize -f nothing disk.raw 2M
        resize nowhere 2M
        resize . 2M
        resize --shrink v2.qcow2 512k
        resize --shrink top.qcow2 64k
        resize over-raw.qcow2 2M
        resize subclusters.qcow2 2M
        resize --shrink subclusters.qcow2 512k
        resize --shrink small-clusters.qcow2 2k
        resize compressed.qcow2 2M
        resize --shrink compressed.qcow2 100k
        resize --shrink external-raw.qcow2 512k
        resize lazy.qcow2 2M
        resize feature.qcow2 2M
        resize leak.qcow2 2M
        resize --preallocation=off disk.qcow2 2M
        resize --preallocation=nonsense disk.qcow2 2M
        resize --preallocation= disk.qcow2 2M
        resize --preallocation
        resize --preallocation=full --shrink disk.qcow2 512k
        resize --preallocation=full disk.qcow2 1M
        resize --preallocation=falloc -f raw disk.raw 2M
        resize --preallocation=full -f raw disk.raw 2M
        resize --preallocation=metadata -f raw disk.raw 2M
        resize --preallocation=full --shrink -f raw disk.raw 512k
        resize --preallocation=full top.qcow2 2M
        resize --preallocation=metadata v2.qcow2 2M
        resize --preallocation=full external.qcow2 2M
        resize --preallocation=metadata external-raw.qcow2 2M
        resize --image-opts driver=raw,file.filename=disk.raw,size=64k 128k
        resize --image-opts -f qcow2 driver=qcow2,file.filename=disk.qcow2 2M
        resize --image-opts disk.qcow2 2M
        resize 'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}' 2M
        resize 'json:{"driver":"qcow2","read-only":true,"file":{"driver":"file","filename":"disk.qcow2"}}' 2M
        resize 'json:{"driver":"qcow2","cache":{"direct":"x"},"file":{"driver":"file","filename":"disk.qcow2"}}' 2M
        resize -p disk.qcow2 2M
        resize -x disk.qcow2 2M
        resize --object nothing,id=x disk.qcow2 2M
        resize -f qcow2 --object throttle-group,id=x disk.qcow2 2M
        resize disk.qcow2 -f qcow2 2M
        resize disk.qcow2 2M -f qcow2
        resize disk.qcow2 2M -q
        resize --shrink disk.qcow2 -512k -q
        resize terabyte.qcow2 +1G
        resize -f raw 'with space.raw' 2M
    """),
    *rows(
        """
        resize -f raw /dev/null 1M
        """,
        differs="a character device is no image",
    ),
    Row("resize small-clusters.qcow2 1G"),
    *rows("""
        resize disk.qcow2 9223372036854775807
        resize -f raw disk.raw 9223372036854775807
    """),
    Row("resize disk.qcow2 2M", held="qemu-io disk.qcow2"),
    Row("resize disk.qcow2 2M", held="qemu-io -r disk.qcow2"),
    Row("resize top.qcow2 2M", held="qemu-io base.qcow2"),
    Row("resize disk.qcow2 2M", process=True),
    Row("resize disk.qcow2 2M", on_disk=True),
)
