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
    """),
    *rows(
        """
        info --image-opts driver=raw,file.filename=disk.raw,offset=4096
        info --image-opts driver=null-co,size=1M
        info --image-opts driver=null-co,size=1M --output=json
        """,
        differs="in json: names numbers are numbers, not the text that they came from",
    ),
    *rows("info disk.qcow2", held="qemu-io disk.qcow2"),
    *rows("info -U disk.qcow2", held="qemu-io disk.qcow2"),
    *rows("info --output=json -U top.qcow2", held="qemu-io top.qcow2"),
    *rows("info disk.qcow2", held="qemu-io -r disk.qcow2"),
)
