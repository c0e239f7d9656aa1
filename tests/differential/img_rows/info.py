"""Rows of `info`."""

from __future__ import annotations

from tests.differential.img_images import IMAGES
from tests.differential.img_matrix import Row, rows

ROWS = (
    *(Row(f"info '{name}'") for name in IMAGES),
    *(Row(f"info --output=json '{name}'") for name in IMAGES if name.endswith(".qcow2")),
    *rows("""
        info
        info nosuch
        info .
        info ''
        info disk.raw more
        info -f raw disk.raw
        info -f raw disk.qcow2
        info -f qcow2 disk.raw
        info -f nosuch disk.raw
        info --format raw disk.raw
        info --output human disk.raw
        info --output json disk.raw
        info --output xml disk.raw
        info --output json
        info --backing-chain disk.raw
        info --backing-chain top.qcow2
        info --backing-chain --output=json top.qcow2
        info --backing-chain over-raw.qcow2
        info --backing-chain unlabelled.qcow2
        info --backing-chain orphan.qcow2
        info --backing-chain --output=json orphan.qcow2
        info --backing-chain loop-a.qcow2
        info --backing-chain self.qcow2
        info --backing-chain mislabelled.qcow2
        info --backing-chain -f qcow2 top.qcow2
        info --image-opts driver=qcow2,file.filename=disk.qcow2
        info --image-opts driver=qcow2,file.driver=file,file.filename=top.qcow2 --backing-chain
        info --image-opts file.filename=disk.qcow2
        info --image-opts -f raw file.filename=disk.qcow2
        info --image-opts disk.qcow2
        info --image-opts driver=qcow2,file.filename=nosuch
        info --image-opts driver=qcow2,file.filename=disk.qcow2,what=1
        info --image-opts driver=qcow2
        info --image-opts driver=nosuch
        info --image-opts ''
        info --image-opts driver=throttle,throttle-group=a,file.driver=null-co --object throttle-group,id=a
        info -U disk.qcow2
        info -U --image-opts driver=null-co,force-share=on
        info -U --image-opts driver=null-co,force-share=off
        info 'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}'
        info 'json:{"driver":"qcow2","file.filename":"disk.qcow2"}'
        info 'json:{"driver":"null-co","size":65536}'
        info 'json:{'
        info 'json:[]'
        info file:disk.qcow2
        info what:disk.qcow2
        info ./disk.qcow2
        info null-co://
        info --image-opts driver=blkdebug,image.filename=disk.raw
        info --image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=disk.qcow2
        info --image-opts driver=blkdebug,image.driver=raw,image.offset=512,image.file.filename=disk.raw
        info --image-opts driver=raw,file.driver=qcow2,file.file.filename=disk.qcow2
        info --image-opts driver=compress,file.driver=qcow2,file.file.filename=external.qcow2
        info --image-opts driver=blkdebug,image.filename=disk.raw,align=4096,cache.direct=off,node-name=a,force-share=on
        info --image-opts driver=blkdebug,image.filename=disk.raw,max-transfer=64k,discard=unmap
        info 'json:{"driver":"blkdebug","image.driver":"file","image.filename":"disk.raw","opt-discard":4096}'
        info --image-opts driver=blkdebug,image.filename=disk.raw,take-child-perms.0=consistent-read,max-discard=1M
        info --image-opts driver=blkdebug,image.filename=disk.raw,set-state.0.event=none,set-state.0.new_state=2
        info --image-opts file.driver=blkdebug,file.image.filename=disk.qcow2,file.inject-error.0.event=cow_read
    """),
    *rows("""
        info --image-opts driver=raw,file.filename=disk.raw,offset=4096
        info --image-opts driver=null-co,size=1M
        info --image-opts driver=null-co,size=1M --output=json
    """),
    *rows("info disk.qcow2", held="qemu-io disk.qcow2"),
    *rows("info -U disk.qcow2", held="qemu-io disk.qcow2"),
    *rows("info --output=json -U top.qcow2", held="qemu-io top.qcow2"),
    *rows("info disk.qcow2", held="qemu-io -r disk.qcow2"),
    # Option by option, as the manual has them.
    *rows("""
        info --output=json 'empty.raw'
        info --output=json 'disk.raw'
        info --output=json 'zeroes.raw'
        info --output=json 'odd.raw'
        info --output=json 'short.raw'
        info --output=json 'text.raw'
        info --output=json 'with space.raw'
        info --output=json 'a,b.raw'
        info --output=json 'a:b.raw'
        info --output=json 'ünïcode.raw'
        info --output=json 'large.raw'
        info --output=json 'external.data'
        info --output=json 'external-raw.data'
        info -f qcow2 'new.qcow2'
        info -f qcow2 'v2.qcow2'
        info -f qcow2 'disk.qcow2'
        info -f qcow2 'base.qcow2'
        info -f qcow2 'mid.qcow2'
        info -f qcow2 'top.qcow2'
        info -f qcow2 'over-raw.qcow2'
        info -f qcow2 'unlabelled.qcow2'
        info -f qcow2 'orphan.qcow2'
        info -f qcow2 'loop-a.qcow2'
        info -f qcow2 'loop-b.qcow2'
        info -f qcow2 'self.qcow2'
        info -f qcow2 'mislabelled.qcow2'
        info -f qcow2 'small-clusters.qcow2'
        info -f qcow2 'subclusters.qcow2'
        info -f qcow2 'compressed.qcow2'
        info -f qcow2 'zstd.qcow2'
        info -f qcow2 'lazy.qcow2'
        info -f qcow2 'external.qcow2'
        info -f qcow2 'external-raw.qcow2'
        info -f qcow2 'snapshots.qcow2'
        info -f qcow2 'bitmaps.qcow2'
        info -f qcow2 'terabyte.qcow2'
        info -f qcow2 'bad-magic.qcow2'
        info -f qcow2 'cut.qcow2'
        info -f qcow2 'cut-l1.qcow2'
        info -f qcow2 'cut-data.qcow2'
        info -f qcow2 'version.qcow2'
        info -f qcow2 'cluster-bits.qcow2'
        info -f qcow2 'l1-size.qcow2'
        info -f qcow2 'l1-huge.qcow2'
        info -f qcow2 'l1-offset.qcow2'
        info -f qcow2 'refcount-order.qcow2'
        info -f qcow2 'refcount-table.qcow2'
        info -f qcow2 'header-length.qcow2'
        info -f qcow2 'feature.qcow2'
        info -f qcow2 'compatible.qcow2'
        info -f qcow2 'autoclear.qcow2'
        info -f qcow2 'dirty.qcow2'
        info -f qcow2 'corrupt.qcow2'
        info -f qcow2 'in-use.qcow2'
        info -f qcow2 'leak.qcow2'
        info -f qcow2 'refcount-low.qcow2'
        info -f qcow2 'refcount-high.qcow2'
        info -f qcow2 'l2-misplaced.qcow2'
        info -f qcow2 'l2-reserved.qcow2'
        info -f qcow2 'l2-beyond.qcow2'
        info --backing-chain disk.qcow2
        info --backing-chain loop-b.qcow2
        info disk.raw disk.qcow2
        info nowhere
        info --output=json nowhere
        info -f nothing disk.raw
        info -f '' disk.raw
        info -f null-co disk.raw
        info -f file disk.raw
        info -f host_device disk.raw
        info -f raw empty.raw
        info -f raw --output=json disk.raw
        info --format=raw disk.qcow2
        info --output=human disk.qcow2
        info --output json disk.qcow2
        info --output=yaml disk.qcow2
        info --output= disk.qcow2
        info --output
        info -q disk.qcow2
        info -p disk.qcow2
        info --force-share disk.qcow2
        info -U --output=json top.qcow2
        info --backing-chain -f raw top.qcow2
        info --backing-chain external.qcow2
        info --backing-chain nowhere
        info --image-opts driver=qcow2,file.driver=file,file.filename=disk.qcow2
        info --image-opts --output=json driver=qcow2,file.filename=disk.qcow2
        info --image-opts driver=raw,file.filename=disk.raw,size=65537
        info --image-opts driver=raw,file.filename=disk.raw,offset=2M
        info --image-opts driver=file,filename=disk.raw
        info --image-opts filename=disk.raw
        info --image-opts filename=disk.qcow2
        info --image-opts driver=qcow2,file=disk.qcow2
        info --image-opts driver=qcow2,file.filename=nowhere
        info --image-opts driver=nothing,file.filename=disk.qcow2
        info --image-opts driver=qcow2,file.filename=disk.qcow2,nonsense=1
        info --image-opts driver=qcow2,file.filename=disk.qcow2,lazy-refcounts=perhaps
        info --image-opts --backing-chain driver=qcow2,file.filename=top.qcow2
        info --image-opts -f qcow2 driver=qcow2,file.filename=disk.qcow2
        info --image-opts driver=qcow2,,x
        info --image-opts driver=copy-on-read,file.driver=qcow2,file.file.filename=disk.qcow2
        info --image-opts driver=throttle,throttle-group=a,file.driver=file,file.filename=disk.raw
        info --output=json 'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}'
        info 'json:{"driver":"raw","file.filename":"disk.raw","offset":65536}'
        info 'json:{"driver":"qcow2"'
        info 'json:'
        info 'json:{}'
        info 'json:{"driver":"qcow2","file":"disk.qcow2"}'
        info 'json:{"driver":"null-co"}'
        info file:./a:b.raw
        info ./a:b.raw
        info blkdebug:nowhere:disk.qcow2
        info nothing:disk.qcow2
        info disk.raw/x
    """),
    *rows(
        """
        info /dev/null
        info -f raw /dev/null
        info /dev/zero
        """,
        differs="a character device is no image",
    ),
    *rows("""
        info --image-opts driver=blkdebug,image.driver=file,image.filename=disk.raw
        info blkdebug::disk.qcow2
        info --image-opts driver=raw,file.filename=disk.raw,offset=65536
        info --image-opts driver=raw,file.filename=disk.raw,size=65536
    """),
    *rows(
        """
        info --image-opts driver=qcow2,file.filename=disk.qcow2,backing=none
        info --image-opts driver=qcow2,file.filename=top.qcow2,backing.driver=qcow2,backing.file.filename=base.qcow2
        """,
        differs="options of the backing file are not refused where info does not open it",
    ),
    *rows(
        """
        info 'json:{"driver":"qcow2","file":{"driver":"file","filename":7}}'
        """,
        differs="it is said that the name is no string, not that there is none",
    ),
    *rows("""
        info --image-opts driver=null-co,size=1G
        info --image-opts --output=json driver=null-co,size=1G
        info 'json:{"driver":"null-co","size":"1G"}'
        info --image-opts driver=raw,file.filename=disk.raw,offset=0
    """),
    *rows(
        """
        info --object secret
        """,
    ),
    *rows(
        """
        info -f vmdk disk.raw
        """,
        differs="there is no such driver",
    ),
    Row("info nbd://localhost/nothing/at/all"),
    Row(
        "info --object throttle-group,id=a --image-opts "
        "driver=throttle,throttle-group=a,file.driver=file,file.filename=disk.raw"
    ),
    Row("info --output=json -U disk.qcow2", held="qemu-io disk.qcow2"),
    Row("info -U disk.qcow2", held="qemu-io -r disk.qcow2"),
    Row("info disk.raw", held="qemu-io -f raw disk.raw"),
    Row("info -f raw disk.raw", held="qemu-io -f raw disk.raw"),
    Row("info -U disk.raw", held="qemu-io -f raw disk.raw"),
    Row("info top.qcow2", held="qemu-io base.qcow2"),
    Row("info --backing-chain top.qcow2", held="qemu-io base.qcow2"),
    Row("info --backing-chain -U top.qcow2", held="qemu-io base.qcow2"),
    Row("info disk.qcow2", process=True),
    Row("info nowhere", process=True),
    Row("info disk.qcow2", on_disk=True),
    Row("info --output=json snapshots.qcow2", on_disk=True),
    Row("info link", given=["ln -s disk.qcow2 link", "test -s disk.qcow2"]),
    Row("info link", given=["ln -s nowhere link"]),
    Row("info link", given=["ln -s link link"]),
    Row("info folder/disk", given=["mkdir folder"]),
)
