"""Rows of `amend`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    *rows("""
        amend
        amend disk.qcow2
        amend -o help
        amend -f qcow2 -o help
        amend -f qcow2 -o ?
        amend -f qcow2 -o help disk.qcow2
        amend -f raw -o help
        amend -f nosuch -o help
        amend -f bochs -o help
        amend -f file -o help
        amend -p -f qcow2 -o help
        amend -o help disk.qcow2
        amend -o help disk.raw
        amend -o help nosuch
        amend -o help disk.qcow2 more
        amend -o '' disk.qcow2
        amend -o , disk.qcow2
        amend -o size=1M
        amend -p -o size=1M
        amend -o size=2M disk.qcow2
        amend -o size=512k disk.qcow2
        amend -o size=0 disk.qcow2
        amend -o size=1000 disk.qcow2
        amend -o size=x disk.qcow2
        amend -o what=1 disk.qcow2
        amend -o what disk.qcow2
        amend -o cluster_size=4k disk.qcow2
        amend -o cluster_size=4k,what=1 disk.qcow2
        amend -o preallocation=full disk.qcow2
        amend -o encryption=on disk.qcow2
        amend -o nocow=on disk.qcow2
        amend -o size=1M -f raw disk.raw
        amend -o size=1M disk.raw
        amend -o size=1M nosuch
        amend -o size=1M -f nosuch disk.raw
        amend -o compat=0.10 disk.qcow2
        amend -o compat=v2 disk.qcow2
        amend -o compat=1.1 disk.qcow2
        amend -o compat=1.1 v2.qcow2
        amend -o compat=0.10 v2.qcow2
        amend -o compat=0.42 disk.qcow2
        amend -o lazy_refcounts=on disk.qcow2
        amend -o lazy_refcounts=off lazy.qcow2
        amend -o lazy_refcounts=on v2.qcow2
        amend -o lazy_refcounts=on,compat=1.1 v2.qcow2
        amend -o refcount_bits=1 disk.qcow2
        amend -o refcount_bits=64 disk.qcow2
        amend -o refcount_bits=16 disk.qcow2
        amend -o refcount_bits=13 disk.qcow2
        amend -o refcount_bits=0 disk.qcow2
        amend -o refcount_bits=8 v2.qcow2
        amend -o refcount_bits=1 snapshots.qcow2
        amend -o compat=0.10 snapshots.qcow2
        amend -o compat=0.10 external.qcow2
        amend -o compat=0.10 subclusters.qcow2
        amend -o compat=0.10 zstd.qcow2
        amend -o compat=0.10 lazy.qcow2
        amend -o backing_file=x disk.qcow2
        amend -o backing_fmt=x disk.qcow2
        amend -o backing_file=mid.qcow2,backing_fmt=qcow2 top.qcow2
        amend -o backing_file=mid.qcow2 top.qcow2
        amend -o backing_fmt=qcow2 top.qcow2
        amend -o backing_file= disk.qcow2
        amend -o backing_fmt= disk.qcow2
        amend -o backing_file=,backing_fmt= disk.qcow2
        amend -o backing_file=base.qcow2 top.qcow2
        amend -o data_file=x disk.qcow2
        amend -o data_file=external.data external.qcow2
        amend -o data_file_raw=on external.qcow2
        amend -o data_file_raw=on disk.qcow2
        amend -o data_file_raw=off external-raw.qcow2
        amend --force -o size=2M disk.qcow2
        amend -q -o size=2M disk.qcow2
        amend -p -q -o compat=0.10 disk.qcow2
        amend -t none -o size=2M disk.qcow2
        amend -t what -o size=2M disk.qcow2
        amend -t what -o help disk.qcow2
        amend --image-opts -o size=2M driver=qcow2,file.filename=disk.qcow2
        amend --image-opts -f qcow2 -o size=2M driver=qcow2,file.filename=disk.qcow2
        amend -o encrypt.state=active disk.qcow2
        amend -o encrypt.state=foo disk.qcow2
        amend -o encrypt.format=luks disk.qcow2
        amend -f luks -o help
        amend -p -o what=1 disk.qcow2
        amend -p -o lazy_refcounts=on disk.qcow2
        amend -p -o compat=0.10 disk.qcow2
    """),
    # Option by option, as the manual has them.
    *rows("""
        amend -o compat=0.10
        amend -f qcow2 -o compat=0.10 disk.qcow2
        amend -q -o compat=0.10 disk.qcow2
        amend -o compat=v3 v2.qcow2
        amend -o compat= disk.qcow2
        amend -o compat=0.10 top.qcow2
        amend -o lazy_refcounts=perhaps disk.qcow2
        amend -o lazy_refcounts=off dirty.qcow2
        amend -o refcount_bits=8 disk.qcow2
        amend -o refcount_bits=3 disk.qcow2
        amend -o refcount_bits=128 disk.qcow2
        amend -o refcount_bits=8,compat=0.10 disk.qcow2
        amend -o size=2M snapshots.qcow2
        amend -o backing_file=base.qcow2 disk.qcow2
        amend -o backing_file=base.qcow2,backing_fmt=qcow2 disk.qcow2
        amend -o backing_file= top.qcow2
        amend -o backing_fmt=raw top.qcow2
        amend -o backing_fmt=nonsense top.qcow2
        amend -o data_file=data external.qcow2
        amend -o data_file=data disk.qcow2
        amend -o cluster_size=64k disk.qcow2
        amend -o preallocation=off disk.qcow2
        amend -o compression_type=zstd disk.qcow2
        amend -o extended_l2=on disk.qcow2
        amend -o nonsense=1 disk.qcow2
        amend -o help -f qcow2
        amend -o help -f raw
        amend -o help -f nothing
        amend -o help nowhere
        amend -f raw -o size=2M disk.raw
        amend -o size=2M disk.raw
        amend -f raw -o compat=0.10 disk.qcow2
        amend -f nothing -o compat=0.10 disk.qcow2
        amend -f qcow2 -o compat=0.10 disk.raw
        amend -o compat=0.10 nowhere
        amend -o compat=0.10 .
        amend -o compat=0.10 bad-magic.qcow2
        amend -o compat=0.10 feature.qcow2
        amend -o compat=0.10 corrupt.qcow2
        amend -o compat=0.10 orphan.qcow2
        amend -o compat=0.10 -o lazy_refcounts=off disk.qcow2
        amend -o compat=0.10 -o compat=1.1 disk.qcow2
        amend -p -o refcount_bits=64 disk.qcow2
        amend -pq -o compat=0.10 disk.qcow2
        amend -t none -o compat=0.10 disk.qcow2
        amend -t writethrough -o compat=0.10 disk.qcow2
        amend -t nonsense -o compat=0.10 disk.qcow2
        amend --force -o compat=0.10 disk.qcow2
        amend -U -o compat=0.10 disk.qcow2
        amend -o compat=0.10 disk.qcow2 v2.qcow2
        amend --image-opts -o compat=0.10 driver=qcow2,file.filename=disk.qcow2
        amend --image-opts -f qcow2 -o compat=0.10 driver=qcow2,file.filename=disk.qcow2
        amend --image-opts -o compat=0.10 disk.qcow2
        amend -o compat=0.10 'json:{"driver":"qcow2","file":{"driver":"file","filename":"disk.qcow2"}}'
    """),
    *rows(
        """
        amend -o compat=0.10 bitmaps.qcow2
        """,
        differs="the bitmaps would be lost, so ours refuses",
    ),
    Row("amend -o compat=0.10 disk.qcow2", held="qemu-io disk.qcow2"),
    Row("amend -o compat=0.10 disk.qcow2", held="qemu-io -r disk.qcow2"),
    Row("amend -t none -o compat=0.10 disk.qcow2", on_disk=True),
    Row("amend -o compat=0.10 disk.qcow2", process=True),
)
