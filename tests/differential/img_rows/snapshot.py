"""Rows of `snapshot`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

_LONG = "n" * 300

ROWS = (
    *rows(
        "snapshot -a what disk.raw", differs="the image is not opened twice, so one warning does"
    ),
    *rows(f"""
        snapshot
        snapshot disk.qcow2
        snapshot -l
        snapshot -l disk.qcow2 more
        snapshot -l disk.qcow2
        snapshot -l snapshots.qcow2
        snapshot -l disk.raw
        snapshot -l nosuch
        snapshot -U -l snapshots.qcow2
        snapshot -q -l snapshots.qcow2
        snapshot -l -l snapshots.qcow2
        snapshot -l -c x snapshots.qcow2
        snapshot -l -c x -Z
        snapshot -a x -d y
        snapshot -c
        snapshot -c x base.qcow2
        snapshot -c '' base.qcow2
        snapshot -c one snapshots.qcow2
        snapshot -c {_LONG} base.qcow2
        snapshot -c x disk.raw
        snapshot -c x v2.qcow2
        snapshot -c x external.qcow2
        snapshot -c x top.qcow2
        snapshot -c x orphan.qcow2
        snapshot -c x bitmaps.qcow2
        snapshot -c x nosuch
        snapshot -U -c x disk.qcow2
        snapshot -a one snapshots.qcow2
        snapshot -a 1 snapshots.qcow2
        snapshot -a what snapshots.qcow2
        snapshot -a what disk.qcow2
        snapshot -d one snapshots.qcow2
        snapshot -d 1 snapshots.qcow2
        snapshot -d what snapshots.qcow2
        snapshot -d what disk.raw
        snapshot --image-opts -l driver=qcow2,file.filename=snapshots.qcow2
        snapshot --image-opts -c x driver=qcow2,file.filename=base.qcow2
        snapshot --image-opts -c x driver=null-co,size=1M
        snapshot --image-opts -a x driver=null-co,size=1M
        snapshot --image-opts -l driver=null-co,size=1M
        snapshot --image-opts -l driver=qcow2,file.filename=nosuch
        snapshot -l bad-magic.qcow2
        snapshot -l cut.qcow2
        snapshot -c x corrupt.qcow2
    """),
    *rows(
        """
        snapshot -l snapshots.qcow2
        snapshot -U -l snapshots.qcow2
        snapshot -d one snapshots.qcow2
        """,
        held="qemu-io snapshots.qcow2",
    ),
    *rows(
        """
        snapshot -a one snapshots.qcow2
        snapshot -d one snapshots.qcow2
        """,
        given=("qemu-img resize snapshots.qcow2 2M",),
    ),
    # Option by option, as the manual has them.
    *rows("""
        snapshot snapshots.qcow2
        snapshot -l snapshots.qcow2 disk.qcow2
        snapshot -l nowhere
        snapshot -l empty.raw
        snapshot -l feature.qcow2
        snapshot -l .
        snapshot -c three snapshots.qcow2
        snapshot -c three disk.qcow2
        snapshot -q -c three disk.qcow2
        snapshot -c '' disk.qcow2
        snapshot -c 1 disk.qcow2
        snapshot -c 1 snapshots.qcow2
        snapshot -c 'a b' disk.qcow2
        snapshot -c ünïcode disk.qcow2
        snapshot -c three v2.qcow2
        snapshot -c three disk.raw
        snapshot -c three top.qcow2
        snapshot -c three subclusters.qcow2
        snapshot -c three compressed.qcow2
        snapshot -c three external.qcow2
        snapshot -c three external-raw.qcow2
        snapshot -c three bitmaps.qcow2
        snapshot -c three corrupt.qcow2
        snapshot -c three dirty.qcow2
        snapshot -c three nowhere
        snapshot -a two snapshots.qcow2
        snapshot -q -a 1 snapshots.qcow2
        snapshot -a three snapshots.qcow2
        snapshot -a '' snapshots.qcow2
        snapshot -a one disk.qcow2
        snapshot -a one nowhere
        snapshot -d two snapshots.qcow2
        snapshot -d 2 snapshots.qcow2
        snapshot -q -d 2 snapshots.qcow2
        snapshot -d three snapshots.qcow2
        snapshot -d '' snapshots.qcow2
        snapshot -d one disk.qcow2
        snapshot -d one disk.raw
        snapshot -d one -c two snapshots.qcow2
        snapshot -c one -c two snapshots.qcow2
        snapshot -l -c two snapshots.qcow2
        snapshot -a one -d one snapshots.qcow2
        snapshot -f qcow2 -l snapshots.qcow2
        snapshot -p -l snapshots.qcow2
        snapshot -U -c three disk.qcow2
        snapshot --image-opts -c three driver=qcow2,file.filename=disk.qcow2
        snapshot --image-opts -d one driver=qcow2,file.filename=snapshots.qcow2
        snapshot --image-opts -l snapshots.qcow2
        snapshot --image-opts -l driver=raw,file.filename=disk.raw
        snapshot -l 'json:{"driver":"qcow2","file":{"driver":"file","filename":"snapshots.qcow2"}}'
        snapshot --object nothing,id=x -l snapshots.qcow2
    """),
    *rows(
        """
        snapshot -a one disk.raw
        """,
        differs="the warning comes once, from qemu-img twice",
    ),
    Row("snapshot -c three snapshots.qcow2", held="qemu-io snapshots.qcow2"),
    Row("snapshot -U -c three snapshots.qcow2", held="qemu-io snapshots.qcow2"),
    Row("snapshot -a one snapshots.qcow2", held="qemu-io snapshots.qcow2"),
    Row("snapshot -l snapshots.qcow2", held="qemu-io -r snapshots.qcow2"),
    Row("snapshot -c three snapshots.qcow2", held="qemu-io -r snapshots.qcow2"),
    Row(
        "snapshot -a small grown.qcow2",
        given=[
            "qemu-img create -f qcow2 grown.qcow2 1M",
            "qemu-img snapshot -c small grown.qcow2",
            "qemu-img resize grown.qcow2 2M",
        ],
    ),
    Row(
        "snapshot -c more many.qcow2",
        given=[
            "qemu-img create -f qcow2 many.qcow2 1M",
            "qemu-img snapshot -c s0 many.qcow2",
            "qemu-img snapshot -c s1 many.qcow2",
            "qemu-img snapshot -c s2 many.qcow2",
            "qemu-img snapshot -c s3 many.qcow2",
            "qemu-img snapshot -c s4 many.qcow2",
            "qemu-img snapshot -c s5 many.qcow2",
            "qemu-img snapshot -c s6 many.qcow2",
            "qemu-img snapshot -c s7 many.qcow2",
            "qemu-img snapshot -c s8 many.qcow2",
            "qemu-img snapshot -c s9 many.qcow2",
            "qemu-img snapshot -c s10 many.qcow2",
            "qemu-img snapshot -c s11 many.qcow2",
        ],
    ),
    Row("snapshot -c three disk.qcow2", process=True),
    Row("snapshot -c three disk.qcow2", on_disk=True),
)
