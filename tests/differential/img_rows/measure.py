"""Rows of `measure`."""

from __future__ import annotations

from tests.differential.img_matrix import rows

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
)
