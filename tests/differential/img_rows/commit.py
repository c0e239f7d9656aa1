"""Rows of `commit`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

_THROTTLED = (
    "--object throttle-group,id=x "
    "--image-opts driver=throttle,throttle-group=x,file.driver=qcow2,file.file.filename=top.qcow2"
)
_READER = "qemu-io -r base.qcow2"

ROWS = (
    *rows("""
        # words
        commit
        commit top.qcow2 mid.qcow2
        commit -z top.qcow2
        commit -b
        commit -U top.qcow2
        commit -r x top.qcow2
        commit -r -1 top.qcow2
        commit -r 9E top.qcow2
        commit -t foo top.qcow2
        commit -t foo nowhere.qcow2
        commit --image-opts -f qcow2 driver=qcow2,file.filename=top.qcow2
        # images
        commit nowhere.qcow2
        commit -f raw top.qcow2
        commit orphan.qcow2
        commit -f raw disk.raw
        commit -p -f raw disk.raw
        commit base.qcow2
        commit -p base.qcow2
        commit -b x top.qcow2
        commit -p -b x top.qcow2
        commit -b top.qcow2 top.qcow2
        # what is done
        commit top.qcow2
        commit -q top.qcow2
        commit -p -q top.qcow2
        commit -d top.qcow2
        commit -r 64M top.qcow2
        commit -t none top.qcow2
        commit -t writethrough top.qcow2
        commit -f qcow2 mid.qcow2
        commit over-raw.qcow2
        commit -b mid.qcow2 top.qcow2
        commit -b base.qcow2 top.qcow2
        commit -b ./base.qcow2 top.qcow2
        commit --image-opts driver=qcow2,file.filename=top.qcow2
    """),
    Row(f"commit -b base.qcow2 {_THROTTLED}"),
    # The backing file is somebody's.
    Row("commit mid.qcow2", held=_READER),
    Row("commit top.qcow2", held=_READER),
    Row("commit -b base.qcow2 top.qcow2", held=_READER),
    Row("commit mid.qcow2", held="qemu-io base.qcow2"),
    # Option by option, as the manual has them.
    *rows("""
        commit -f qcow2 top.qcow2
        commit -p top.qcow2
        commit -pq top.qcow2
        commit mid.qcow2
        commit unlabelled.qcow2
        commit -b nowhere top.qcow2
        commit -b disk.qcow2 top.qcow2
        commit -b '' top.qcow2
        commit -b base.qcow2 -d top.qcow2
        commit -b base.qcow2 -p top.qcow2
        commit -b base.qcow2 mid.qcow2
        commit -b base.qcow2 base.qcow2
        commit disk.qcow2
        commit disk.raw
        commit nowhere
        commit .
        commit mislabelled.qcow2
        commit self.qcow2
        commit bad-magic.qcow2
        commit feature.qcow2
        commit corrupt.qcow2
        commit -f nothing top.qcow2
        commit -f qcow2 disk.raw
        commit -t unsafe top.qcow2
        commit -t nonsense top.qcow2
        commit -r 10M top.qcow2
        commit -r 0 top.qcow2
        commit --image-opts top.qcow2
        commit --image-opts -b base.qcow2 driver=qcow2,file.filename=top.qcow2
        commit 'json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}'
        commit --object nothing,id=x top.qcow2
        commit --nonsense top.qcow2
    """),
    Row(
        "commit larger.qcow2",
        given=[
            "qemu-img create -f qcow2 -b base.qcow2 -F qcow2 larger.qcow2 2M",
            "qemu-io larger.qcow2 -c 'write -P 9 1536k 64k'",
        ],
    ),
    Row(
        "commit larger.qcow2",
        given=[
            "qemu-img create -f qcow2 -b disk.raw -F raw larger.qcow2 2M",
            "qemu-io larger.qcow2 -c 'write -P 9 1536k 64k'",
        ],
    ),
    Row(
        "commit smaller.qcow2",
        given=[
            "qemu-img create -f qcow2 -b base.qcow2 -F qcow2 smaller.qcow2 512k",
            "qemu-io smaller.qcow2 -c 'write -P 9 128k 64k'",
        ],
    ),
    Row(
        "commit snapped.qcow2",
        given=[
            "qemu-img create -f qcow2 -b base.qcow2 -F qcow2 snapped.qcow2",
            "qemu-io snapped.qcow2 -c 'write -P 9 128k 64k'",
            "qemu-img snapshot -c one snapped.qcow2",
        ],
    ),
    Row("commit top.qcow2", held="qemu-io mid.qcow2"),
    Row("commit top.qcow2", held="qemu-io -r mid.qcow2"),
    Row("commit top.qcow2", held="qemu-io -r top.qcow2"),
    Row("commit -b base.qcow2 top.qcow2", held="qemu-io -r mid.qcow2"),
    Row("commit top.qcow2", process=True),
    Row("commit -p -b base.qcow2 top.qcow2", process=True),
    Row("commit -t none top.qcow2", on_disk=True),
)
