"""Rows of `measure`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    *rows("measure --size", differs="the help is another"),
    *rows("""
        measure
        measure --size 1M
        measure --size 1000
        measure --size 0
        measure --size 1.5G
        measure --size -1
        measure --size x
        measure --size 8E
        measure --size 7E
        measure --size 1M --size 2M
        measure --size 1M disk.raw
        measure --size 1M disk.raw more
        measure disk.raw more
        measure -f raw
        measure -l x
        measure -l snapshot.id=1
        measure --image-opts
        measure --image-opts --size 1M
        measure --output json --size 1M
        measure --output human --size 1M
        measure --output xml --size 1M
        measure --output=json -O qcow2 --size 1M
        measure -O qcow2 --size 1M
        measure -O qcow2 --size 1000
        measure -O qcow2 --size 0
        measure -O qcow2 --size 2P
        measure -O qcow2 --size 7E
        measure -O qcow2 -o cluster_size=2M --size 2P
        measure -O qcow2 -o encrypt.format=luks --size 1M
        measure -O qcow2 -o encrypt.format=aes --size 1M
        measure -O qcow2 -o encryption=on --size 1M
        measure --object secret,id=s,data=a -O qcow2 -o encrypt.format=luks,encrypt.key-secret=s --size 1M
        measure --object secret,id=s,data=a -O luks -o key-secret=s --size 1M
        measure -O luks --size 1M
        measure -O file --size 1M
        measure -O nosuch --size 1M
        measure -O null-co --size 1M
        measure -O qcow2 -o cluster_size=512 --size 1G
        measure -O qcow2 -o cluster_size=3k --size 1G
        measure -O qcow2 -o extended_l2=on --size 1G
        measure -O qcow2 -o extended_l2=on,cluster_size=4k --size 1G
        measure -O qcow2 -o refcount_bits=1 --size 1G
        measure -O qcow2 -o refcount_bits=7 --size 1G
        measure -O qcow2 -o compat=0.10 --size 1G
        measure -O qcow2 -o compat=0.10,refcount_bits=1 --size 1G
        measure -O qcow2 -o compat=what --size 1G
        measure -O qcow2 -o preallocation=metadata --size 1G
        measure -O qcow2 -o preallocation=full --size 1G
        measure -O qcow2 -o preallocation=what --size 1G
        measure -O qcow2 -o what=1 --size 1G
        measure -O qcow2 -o cluster_size=x --size 1G
        measure -O qcow2 -o size=2M --size 1M
        measure -O qcow2 -o nocow=on --size 1M
        measure -O qcow2 -o data_file=x --size 1M
        measure -O qcow2 -o backing_fmt=x --size 1M
        measure -O qcow2 -o '' --size 1M
        measure -O qcow2 -o , --size 1M
        measure -O raw -o preallocation=what --size 1M
        measure -O raw -o cluster_size=64k --size 1M
    """),
    *rows("""
        measure disk.raw
        measure -f raw disk.raw
        measure -f raw -O qcow2 disk.raw
        measure -f raw -O qcow2 zeroes.raw
        measure -f raw -O qcow2 odd.raw
        measure -f raw -O qcow2 empty.raw
        measure -f raw -O qcow2 large.raw
        measure -O qcow2 disk.qcow2
        measure -O raw disk.qcow2
        measure -O qcow2 -o cluster_size=4k disk.qcow2
        measure -O qcow2 top.qcow2
        measure -O qcow2 -o backing_file=base.qcow2 top.qcow2
        measure -O qcow2 -o preallocation=falloc disk.qcow2
        measure -O qcow2 small-clusters.qcow2
        measure -O qcow2 subclusters.qcow2
        measure -O qcow2 compressed.qcow2
        measure -O qcow2 external.qcow2
        measure -O qcow2 bitmaps.qcow2
        measure -O qcow2 --output=json bitmaps.qcow2
        measure -O qcow2 -o compat=0.10 bitmaps.qcow2
        measure -O raw bitmaps.qcow2
        measure -O qcow2 v2.qcow2
        measure -O qcow2 -o size=5M disk.qcow2
        measure nosuch
        measure -f nosuch disk.raw
        measure -f qcow2 disk.raw
        measure orphan.qcow2
        measure --image-opts driver=qcow2,file.filename=disk.qcow2 -O qcow2
        measure --image-opts driver=null-co,size=1M -O qcow2
        measure -U --image-opts driver=null-co,size=1M,force-share=off
        measure -l 1 -O qcow2 snapshots.qcow2
        measure -l one -O qcow2 snapshots.qcow2
        measure -l two snapshots.qcow2
        measure -l what snapshots.qcow2
        measure -l '' snapshots.qcow2
        measure -l snapshot.id=1 snapshots.qcow2
        measure -l snapshot.name=one snapshots.qcow2
        measure -l snapshot.id=2,snapshot.name=one snapshots.qcow2
        measure -l snapshot.id=2,snapshot.name=two snapshots.qcow2
        measure -l snapshot.what=1 snapshots.qcow2
        measure -l snapshot.id snapshots.qcow2
        measure -l one -f raw disk.raw
    """),
    *rows("measure disk.qcow2", held="qemu-io disk.qcow2"),
    *rows("measure -U disk.qcow2", held="qemu-io disk.qcow2"),
    # Option by option, as the manual has them.
    *rows("""
        measure --size=0
        measure --size=1
        measure --size=512
        measure --size=1000
        measure --size=1M
        measure --size=1G
        measure --size=1T
        measure --size=2P
        measure --size=8E
        measure --size=x
        measure --size=''
        measure --size=-1
        measure --size=+1M
        measure --size=1.5M
        measure --size=0 -O qcow2
        measure --size=1 -O qcow2
        measure --size=512 -O qcow2
        measure --size=1000 -O qcow2
        measure --size=1M -O qcow2
        measure --size=1G -O qcow2
        measure --size=1T -O qcow2
        measure --size=2P -O qcow2
        measure --size=8E -O qcow2
        measure --size=x -O qcow2
        measure --size='' -O qcow2
        measure --size=-1 -O qcow2
        measure --size=+1M -O qcow2
        measure --size=1.5M -O qcow2
        measure -O raw disk.raw
        measure -O qcow2 disk.raw
        measure -O qcow2 over-raw.qcow2
        measure -O qcow2 zeroes.raw
        measure -O qcow2 odd.raw
        measure -O raw odd.raw
        measure -O qcow2 empty.raw
        measure -O qcow2 large.raw
        measure -O qcow2 snapshots.qcow2
        measure -O qcow2 orphan.qcow2
        measure -O qcow2 corrupt.qcow2
        measure -O qcow2 l2-beyond.qcow2
        measure -O qcow2 feature.qcow2
        measure -O qcow2 bad-magic.qcow2
        measure -O qcow2 nowhere
        measure -O nothing disk.raw
        measure -O file disk.raw
        measure -O null-co disk.raw
        measure -O '' disk.raw
        measure -f nothing disk.raw
        measure disk.raw disk.qcow2
        measure --output=json disk.raw
        measure --output=json -O qcow2 disk.qcow2
        measure --output=json -O qcow2 bitmaps.qcow2
        measure --output=human -O qcow2 disk.qcow2
        measure --output=yaml -O qcow2 disk.qcow2
        measure --output=json --size 1G -O qcow2
        measure -U -O qcow2 disk.qcow2
        measure -o cluster_size=4k -O qcow2 --size 1G
        measure -o cluster_size=512 -O qcow2 --size 1G
        measure -o cluster_size=2M -O qcow2 --size 1G
        measure -o cluster_size=3 -O qcow2 --size 1G
        measure -o refcount_bits=1 -O qcow2 --size 1G
        measure -o refcount_bits=64 -O qcow2 --size 1G
        measure -o refcount_bits=5 -O qcow2 --size 1G
        measure -o preallocation=full -O qcow2 --size 1G
        measure -o preallocation=metadata -O qcow2 --size 1G
        measure -o extended_l2=on -O qcow2 --size 1G
        measure -o compat=0.10 -O qcow2 --size 1G
        measure -o lazy_refcounts=on,compat=0.10 -O qcow2 --size 1G
        measure -o data_file=x -O qcow2 --size 1G
        measure -o backing_file=base.qcow2,backing_fmt=qcow2 -O qcow2 disk.raw
        measure -o size=5M -O qcow2 disk.raw
        measure -o size=5M -O qcow2
        measure -o nonsense=1 -O qcow2 disk.raw
        measure -o cluster_size=4k -o extended_l2=on -O qcow2 --size 1G
        measure -o help -O qcow2
        measure -o help
        measure -o '' -O qcow2 disk.raw
        measure -o preallocation=full disk.raw
        measure -l snapshot.name=two -O qcow2 snapshots.qcow2
        measure -l snapshot.id=2 -O qcow2 snapshots.qcow2
        measure -l snapshot.nonsense=2 -O qcow2 snapshots.qcow2
        measure -l snapshot.id=2,snapshot.name=one -O qcow2 snapshots.qcow2
        measure -l three -O qcow2 snapshots.qcow2
        measure -l one -O qcow2 disk.raw
        measure -l one -O qcow2 --size 1M
        measure --image-opts driver=qcow2,file.filename=disk.qcow2
        measure --image-opts -O qcow2 driver=qcow2,file.filename=disk.qcow2
        measure --image-opts -f qcow2 driver=qcow2,file.filename=disk.qcow2
        measure --image-opts disk.qcow2
        measure -f raw --size 1M
        measure --size=1M -O qcow2 -O raw
        measure --object nothing,id=x --size 1M
        measure 'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}'
    """),
    *rows(
        """
        measure -O
        measure -q -O qcow2 disk.qcow2
        measure --nonsense
        """,
        differs="help texts are our own",
    ),
    *rows(
        """
        measure -O vmdk disk.raw
        """,
        differs="there is no such driver",
    ),
    Row(
        "measure -O qcow2 --output=json -l one bitmaps.qcow2",
        given=["qemu-img snapshot -c one bitmaps.qcow2"],
    ),
    Row("measure -O qcow2 disk.qcow2", held="qemu-io disk.qcow2"),
    Row("measure -O qcow2 -f raw disk.raw", held="qemu-io -f raw disk.raw"),
    Row("measure -U -O qcow2 disk.qcow2", held="qemu-io disk.qcow2"),
    Row("measure -O qcow2 disk.qcow2", held="qemu-io -r disk.qcow2"),
    Row("measure -O qcow2 disk.raw", on_disk=True),
    Row("measure --size 1M", process=True),
)
