"""Rows of `compare`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    *rows("""
        compare
        compare disk.raw
        compare disk.raw disk.raw disk.raw
        compare nowhere.raw disk.raw
        compare disk.raw nowhere.raw
        compare disk.raw disk.raw
        compare -p disk.raw disk.raw
        compare -p disk.raw disk.qcow2
        compare -q -p disk.raw disk.qcow2
        compare -p disk.raw short.raw
        compare -q disk.raw short.raw
        compare disk.raw short.raw
        compare short.raw disk.raw
        compare short.raw zeroes.raw
        compare -s disk.raw short.raw
        compare -s disk.raw disk.qcow2
        compare -s disk.qcow2 disk.qcow2
        compare disk.raw compressed.qcow2
        compare -s disk.raw compressed.qcow2
        compare disk.raw zstd.qcow2
        compare new.qcow2 zeroes.raw
        compare zeroes.raw new.qcow2
        compare zeroes.raw empty.raw
        compare empty.raw zeroes.raw
        compare -p empty.raw empty.raw
        compare empty.raw disk.raw
        compare odd.raw zeroes.raw
        compare zeroes.raw odd.raw
        compare disk.raw large.raw
        compare -s new.qcow2 v2.qcow2
        compare base.qcow2 mid.qcow2
        compare mid.qcow2 top.qcow2
        compare -p top.qcow2 mid.qcow2
        compare -s top.qcow2 top.qcow2
        compare -f raw -F qcow2 disk.raw disk.qcow2
        compare -f qcow2 disk.raw disk.qcow2
        compare -f raw -F raw disk.raw disk.qcow2
        compare -T none disk.qcow2 disk.qcow2
        compare -T nothing disk.qcow2 disk.qcow2
        compare -T writethrough disk.qcow2 disk.qcow2
        compare --image-opts disk.raw disk.raw
        compare --image-opts driver=raw,file.filename=disk.raw driver=qcow2,file.filename=disk.qcow2
        compare --image-opts -f raw driver=raw,file.filename=disk.raw driver=raw,file.filename=disk.raw
        compare --object nothing disk.raw disk.raw
        compare --object throttle-group,id=t disk.raw disk.raw
        compare -U disk.qcow2 disk.qcow2
        compare --force-share disk.raw disk.raw
        compare -x disk.raw disk.raw
        compare disk.qcow2 l2-reserved.qcow2
        compare l2-misplaced.qcow2 disk.qcow2
        compare disk.qcow2 l2-beyond.qcow2
    """),
    Row("compare disk.qcow2 disk.qcow2", held="qemu-io disk.qcow2"),
    Row("compare -U disk.qcow2 disk.qcow2", held="qemu-io disk.qcow2"),
    Row(
        "compare one.raw two.raw",
        given=[
            "cp disk.raw one.raw",
            "cp disk.raw two.raw",
            "qemu-io -f raw two.raw -c 'write -P 9 190k 1k'",
        ],
    ),
    Row(
        "compare one.qcow2 disk.qcow2",
        given=["cp disk.qcow2 one.qcow2", "qemu-io one.qcow2 -c 'write -P 7 1022k 512'"],
    ),
    Row(
        "compare new.qcow2 one.qcow2",
        given=["cp new.qcow2 one.qcow2", "qemu-io one.qcow2 -c 'write -P 7 132k 512'"],
    ),
    Row(
        "compare -s new.qcow2 full.qcow2",
        given=["qemu-img create -f qcow2 -o preallocation=metadata full.qcow2 1M"],
    ),
    Row("compare -p disk.raw disk.qcow2", process=True, on_disk=True),
)
