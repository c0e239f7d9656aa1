"""Rows of `bitmap`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

_B0 = ("cp disk.qcow2 one.qcow2", "qemu-img bitmap --add -g 32k one.qcow2 b0")
_TWO = (
    *_B0,
    "qemu-img bitmap --add one.qcow2 b1",
    "qemu-img bitmap --disable one.qcow2 b1",
    "qemu-io one.qcow2 -c 'write 200k 1k'",
)

ROWS = (
    *rows("""
        bitmap
        bitmap disk.qcow2
        bitmap disk.qcow2 b0
        bitmap --add
        bitmap --add disk.qcow2
        bitmap --add disk.qcow2 b0 b1
        bitmap --add nowhere.qcow2 b0
        bitmap --add disk.qcow2 b0
        bitmap --add disk.qcow2 ""
        bitmap --add -g 32k disk.qcow2 b0
        bitmap --add --granularity 512 disk.qcow2 b0
        bitmap --add -g 100 disk.qcow2 b0
        bitmap --add -g 3k disk.qcow2 b0
        bitmap --add -g 1 disk.qcow2 b0
        bitmap --add -g x disk.qcow2 b0
        bitmap --add -g -1 disk.qcow2 b0
        bitmap --add -g 2G disk.qcow2 b0
        bitmap --add -g 4G disk.qcow2 b0
        bitmap --add -g 8G disk.qcow2 b0
        bitmap --add -g 5G disk.qcow2 b0
        bitmap --remove -g 64k disk.qcow2 b0
        bitmap --remove disk.qcow2 b0
        bitmap --clear disk.qcow2 b0
        bitmap --enable disk.qcow2 b0
        bitmap --disable disk.qcow2 b0
        bitmap --merge disk.qcow2
        bitmap --merge b1 disk.qcow2 b0
        bitmap --add --merge b1 disk.qcow2 b0
        bitmap --add --merge b0 disk.qcow2 b0
        bitmap --add -F qcow2 disk.qcow2 b0
        bitmap --add -b top.qcow2 disk.qcow2 b0
        bitmap --merge b1 -b nowhere.qcow2 disk.qcow2 b0
        bitmap --add --merge b1 -b top.qcow2 disk.qcow2 b0
        bitmap --add --merge b1 -b top.qcow2 -F raw disk.qcow2 b0
        bitmap --add --add disk.qcow2 b0
        bitmap --add --remove disk.qcow2 b0
        bitmap --add --remove --add --disable disk.qcow2 b0
        bitmap --add v2.qcow2 b0
        bitmap --add -f raw disk.raw b0
        bitmap --add -f qcow2 disk.raw b0
        bitmap --remove -f raw disk.raw b0
        bitmap --add --image-opts driver=qcow2,file.filename=disk.qcow2 b0
        bitmap --add --image-opts -f qcow2 driver=qcow2,file.filename=disk.qcow2 b0
        bitmap --add small-clusters.qcow2 b0
        bitmap --add subclusters.qcow2 b0
        bitmap -x --add disk.qcow2 b0
        bitmap --add corrupt.qcow2 b0
    """),
    *rows(
        """
        bitmap --add one.qcow2 b0
        bitmap --remove one.qcow2 b0
        bitmap --remove one.qcow2 b1
        bitmap --clear one.qcow2 b0
        bitmap --disable one.qcow2 b0
        bitmap --enable one.qcow2 b0
        bitmap --disable --disable --clear --enable one.qcow2 b0
        bitmap --merge b0 one.qcow2 b0
        bitmap --add --merge b0 --disable one.qcow2 b2
        bitmap --remove --remove one.qcow2 b0
        """,
        given=_B0,
    ),
    *rows(
        """
        bitmap --merge b1 one.qcow2 b0
        bitmap --merge b0 one.qcow2 b1
        bitmap --merge b0 --merge b1 --add one.qcow2 b2
        bitmap --add --merge b0 --merge b1 one.qcow2 b2
        bitmap --add --merge b0 -b one.qcow2 -F qcow2 disk.qcow2 b0
        bitmap --add -g 64k --merge b0 -b one.qcow2 disk.qcow2 b0
        bitmap --add --merge b0 -b one.qcow2 -F qcow2 small-clusters.qcow2 b0
        bitmap --merge b0 -b one.qcow2 -F qcow2 one.qcow2 b1
        bitmap --remove one.qcow2 b1
        """,
        given=_TWO,
    ),
    Row("bitmap --add disk.qcow2 " + "b" * 1023),
    Row("bitmap --add disk.qcow2 " + "b" * 1024),
    Row("bitmap --add disk.qcow2 b0", held="qemu-io disk.qcow2"),
    Row("bitmap --add disk.qcow2 b0", held="qemu-io -r disk.qcow2"),
    *rows("""
        bitmap --clear in-use.qcow2 b0
        bitmap --merge b0 in-use.qcow2 b1
        bitmap --merge b1 in-use.qcow2 b0
        bitmap --enable in-use.qcow2 b0
        bitmap --disable in-use.qcow2 b0
        bitmap --add in-use.qcow2 b0
        bitmap --add in-use.qcow2 b2
        bitmap --remove in-use.qcow2 b0
        bitmap --remove --add in-use.qcow2 b0
        bitmap --clear in-use.qcow2 b1
        bitmap --add --merge b0 -b bitmaps.qcow2 in-use.qcow2 b2
    """),
)
