"""Rows of `snapshot`."""

from __future__ import annotations

from tests.differential.img_matrix import rows

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
)
