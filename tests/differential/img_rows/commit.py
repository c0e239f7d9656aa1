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
)
