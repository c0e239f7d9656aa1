"""Rows of `dd`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

_OWN = "an image is not overwritten by what it is made from"
_WRITER = "what another process writes is not read without being asked to (-U)"
_USED = "an image that somebody else has open is not made anew"

ROWS = (
    *rows("""
        dd if=disk.raw of=out
        dd -O qcow2 if=disk.raw of=out
        dd -f qcow2 -O raw if=disk.qcow2 of=out
        dd -f raw if=disk.qcow2 of=out
        dd bs=64k if=disk.raw of=out
        dd bs=1M count=1 if=disk.raw of=out
        dd bs=1 count=100 skip=70000 if=disk.raw of=out
        dd bs=511 count=3 skip=200 -O qcow2 if=disk.raw of=out
        dd bs=4M if=disk.raw of=out
        dd bs=64k skip=1 if=disk.raw of=out
        dd bs=64k skip=16 if=disk.raw of=out
        dd bs=64k skip=17 if=disk.raw of=out
        dd bs=64k skip=17 -O qcow2 if=disk.raw of=out
        dd skip=1E bs=1G if=disk.raw of=out
        dd count=1E bs=1G if=disk.raw of=out
        dd count=0 if=disk.raw of=out
        dd count=3 skip=2 if=disk.raw of=out
        dd count=2 skip=3 if=disk.raw of=out
        dd if=odd.raw of=out
        dd if=text.raw of=out bs=100
        dd if=empty.raw of=out
        dd if=zeroes.raw of=out -O qcow2
        dd if=top.qcow2 of=out
        dd if=compressed.qcow2 of=out
        dd if=disk.raw of=zeroes.raw
        dd if=disk.raw of=out if=short.raw
        dd bs=0 if=disk.raw of=out
        dd bs=x if=disk.raw of=out
        dd bs=2G if=disk.raw of=out
        dd bs=-1 if=disk.raw of=out
        dd bs= if=disk.raw of=out
        dd count=x if=disk.raw of=out
        dd count=-1 if=disk.raw of=out
        dd skip=x if=disk.raw of=out
        dd skip=-1 if=disk.raw of=out
        dd what=x if=disk.raw of=out
        dd conv=sync if=disk.raw of=out
        dd what if=disk.raw of=out
        dd =x if=disk.raw of=out
        dd if=disk.raw
        dd of=out
        dd
        dd if= of=out
        dd if=disk.raw of=
        dd if=nowhere of=out
        dd if=disk.raw of=nowhere/out
        dd if=disk.raw of=.
        dd if=disk.raw of=what:ever
        dd -O nothing if=disk.raw of=out
        dd -f nothing if=disk.raw of=out
        dd -f qcow2 if=disk.raw of=out
        dd -z if=disk.raw of=out
        dd -O
        dd --image-opts if=driver=raw,file.filename=disk.raw of=out
        dd --image-opts -f raw if=driver=raw,file.filename=disk.raw of=out
        dd --image-opts if=disk.raw of=out
        dd --object nothing,id=x if=disk.raw of=out
        dd -U if=disk.raw of=out
        dd if=cut-data.qcow2 of=out
        dd if=l2-reserved.qcow2 of=out
        dd if=corrupt.qcow2 of=out
    """),
    Row("dd if=disk.raw of=out", held="qemu-io -f raw disk.raw", differs=_WRITER),
    Row("dd -U if=disk.raw of=out", held="qemu-io -f raw disk.raw"),
    Row("dd if=disk.raw of=zeroes.raw", held="qemu-io -f raw zeroes.raw", differs=_USED),
    Row("dd if=disk.raw of=disk.raw", differs=_OWN),
    # Option by option, as the manual has them.
    *rows("""
        dd -f raw if=disk.raw of=out
        dd -f raw -O raw if=disk.raw of=out
        dd -O qcow2 if=disk.qcow2 of=out
        dd -O null-co if=disk.raw of=out
        dd if=. of=out
        dd if=disk.raw of=disk.qcow2
        dd if=disk.raw of=out bs=1M
        dd if=disk.raw of=out bs=64k
        dd if=disk.raw of=out bs=1000
        dd if=text.raw of=out bs=1
        dd if=disk.raw of=out bs=0
        dd if=disk.raw of=out bs=-1
        dd if=disk.raw of=out bs=x
        dd if=disk.raw of=out bs=
        dd if=disk.raw of=out bs=2G
        dd if=disk.raw of=out bs=4G
        dd if=disk.raw of=out bs=64k count=2
        dd if=disk.raw of=out bs=64k count=0
        dd if=disk.raw of=out bs=64k count=100
        dd if=disk.raw of=out bs=64k count=x
        dd if=disk.raw of=out bs=64k count=-1
        dd if=disk.raw of=out bs=64k skip=1
        dd if=disk.raw of=out bs=64k skip=15
        dd if=disk.raw of=out bs=64k skip=16
        dd if=disk.raw of=out bs=64k skip=17
        dd if=disk.raw of=out bs=64k skip=1 count=2
        dd if=disk.raw of=out bs=64k skip=15 count=5
        dd if=disk.raw of=out bs=64k skip=x
        dd if=disk.raw of=out bs=64k skip=-1
        dd if=disk.raw of=out bs=64k skip=8E
        dd if=disk.raw of=out bs=64k count=8E
        dd if=odd.raw of=out bs=512
        dd if=odd.raw of=out bs=300 skip=1
        dd if=odd.raw of=out -O qcow2
        dd if=empty.raw of=out -O qcow2
        dd if=zeroes.raw of=out
        dd if=subclusters.qcow2 of=out bs=4k
        dd if=compressed.qcow2 of=out -O qcow2
        dd if=cut-data.qcow2 of=out bs=64k
        dd if=orphan.qcow2 of=out
        dd if=bad-magic.qcow2 of=out
        dd if=l2-reserved.qcow2 of=out bs=64k
        dd seek=1 if=disk.raw of=out
        dd conv=notrunc if=disk.raw of=out
        dd iflag=direct if=disk.raw of=out
        dd nonsense if=disk.raw of=out
        dd if=disk.raw if=odd.raw of=out
        dd bs=1k bs=64k if=disk.raw of=out
        dd if=disk.raw of=out of=out2
        dd -q if=disk.raw of=out
        dd -p if=disk.raw of=out
        dd -U if=disk.qcow2 of=out
        dd --image-opts if=driver=qcow2,file.filename=disk.qcow2 of=out
        dd --image-opts if=disk.qcow2 of=out
        dd --image-opts -f qcow2 if=driver=qcow2,file.filename=disk.qcow2 of=out
        dd --image-opts if=driver=qcow2,file.filename=disk.qcow2 of=driver=raw,file.filename=zeroes.raw
        dd --nonsense if=disk.raw of=out
        dd -f
        dd if=disk.raw of=out bs=64k -O qcow2
        dd if='with space.raw' of='the out'
        dd if=a,b.raw of=c,d
    """),
    Row("dd if=disk.qcow2 of=out", held="qemu-io disk.qcow2"),
    Row("dd -U if=disk.qcow2 of=out", held="qemu-io disk.qcow2"),
    Row("dd if=disk.raw of=disk.qcow2", held="qemu-io disk.qcow2"),
    Row("dd if=disk.raw of=out bs=64k", given=["truncate -s 5M out", "poke out 0 ff"]),
    Row("dd if=disk.raw of=out bs=64k", process=True),
    Row("dd if=disk.raw of=out bs=64k -O qcow2", on_disk=True),
)
