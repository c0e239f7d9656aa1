"""Rows of `bench`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    *rows("""
        bench -c 100 disk.raw
        bench -c 100 -f raw disk.raw
        bench -c 100 -d 1 disk.qcow2
        bench -c 10 -d 64 disk.qcow2
        bench -c 0 disk.raw
        bench -c 5 -d 0 -c 0 disk.raw
        bench -c 3 -s 64k disk.raw
        bench -c 100 -S 512 disk.raw
        bench -c 100 -s 512 -S 8k -o 4k disk.raw
        bench -c 100 -q disk.raw
        bench -c 100 -U disk.raw
        bench -c 100 -w -f raw disk.raw
        bench -c 16 -s 64k -w -f qcow2 new.qcow2
        bench -c 16 -s 64k -w --pattern 7 -f qcow2 new.qcow2
        bench -c 16 -s 64k -w --pattern=0x41 -f raw zeroes.raw
        bench -c 100 -w --flush-interval 64 -f raw zeroes.raw
        bench -c 100 -w -d 4 --flush-interval 10 -f raw zeroes.raw
        bench -c 100 -w -d 4 --flush-interval 10 --no-drain -f raw zeroes.raw
        bench --flush-interval 64 disk.raw
        bench -w --flush-interval 4 disk.raw
        bench -w -d 8 --flush-interval 7 disk.raw
        bench -c x disk.raw
        bench -c -1 disk.raw
        bench -c 1k disk.raw
        bench -c 2147483648 disk.raw
        bench -d x disk.raw
        bench -d 2147483648 disk.raw
        bench -o x disk.raw
        bench -o 1M -c 1 disk.raw
        bench -o 1020k -s 8k -c 1 disk.raw
        bench -s x disk.raw
        bench -s 2G disk.raw
        bench -S x disk.raw
        bench -S 2G disk.raw
        bench --pattern 256 disk.raw
        bench --pattern x disk.raw
        bench --flush-interval x disk.raw
        bench --flush-interval -1 disk.raw
        bench -i x disk.raw
        bench -c 10 -i threads disk.raw
        bench -i native disk.raw
        bench -n disk.raw
        bench -t x disk.raw
        bench -c 10 -t unsafe disk.raw
        bench -c 10 -t writethrough -w -f raw disk.raw
        bench -f nothing disk.raw
        bench -f qcow2 disk.raw
        bench nowhere
        bench
        bench disk.raw short.raw
        bench -z
        bench --object throttle-group,id=x disk.raw
        bench -c 10 --image-opts driver=qcow2,file.filename=disk.qcow2
        bench --image-opts -f raw driver=qcow2,file.filename=disk.qcow2
        bench -c 10 l2-reserved.qcow2
    """),
    Row("bench -c 10 -t none -n disk.raw", on_disk=True),
    Row("bench -c 10 -t none -i io_uring disk.raw", on_disk=True),
    Row(
        "bench -c 10 disk.raw",
        held="qemu-io -f raw disk.raw",
        differs="what another process writes is not read without being asked to (-U)",
    ),
    Row("bench -U -c 10 disk.raw", held="qemu-io -f raw disk.raw"),
    # Option by option, as the manual has them.
    *rows("""
        bench -c 8 disk.raw
        bench -c 8 -f raw disk.raw
        bench -c 8 disk.qcow2
        bench -c 8 -q disk.qcow2
        bench -c 8 -w -f raw disk.raw
        bench -c 8 -w disk.qcow2
        bench -c 8 -w --pattern=7 disk.qcow2
        bench -c 8 -w --pattern=255 -s 64k -S 128k -f raw disk.raw
        bench -c 8 -w --pattern=256 disk.qcow2
        bench -c 8 -w --pattern=-1 disk.qcow2
        bench -c 8 -w --pattern=x disk.qcow2
        bench -c 8 --pattern=7 disk.qcow2
        bench -c 8 -d 1 disk.qcow2
        bench -c 8 -d -1 disk.qcow2
        bench -c 8 -d x disk.qcow2
        bench -c 0 disk.qcow2
        bench -c -1 disk.qcow2
        bench -c x disk.qcow2
        bench -c '' disk.qcow2
        bench -c 99999999999 disk.qcow2
        bench -c 8 -s 4k disk.qcow2
        bench -c 8 -s 0 disk.qcow2
        bench -c 8 -s 1 disk.qcow2
        bench -c 8 -s 1000 disk.qcow2
        bench -c 2 -s 1M disk.qcow2
        bench -c 2 -s 2M disk.qcow2
        bench -c 2 -s 8E disk.qcow2
        bench -c 2 -s x disk.qcow2
        bench -c 8 -S 4k disk.qcow2
        bench -c 8 -S 0 disk.qcow2
        bench -c 8 -S x disk.qcow2
        bench -c 8 -S 8k -s 4k disk.qcow2
        bench -c 8 -o 64k disk.qcow2
        bench -c 8 -o 1000 disk.qcow2
        bench -c 8 -o 1M disk.qcow2
        bench -c 8 -o x disk.qcow2
        bench -c 8 -o -1 disk.qcow2
        bench -c 8 --flush-interval=2 -w -d 2 disk.qcow2
        bench -c 8 --flush-interval=2 -w -d 4 disk.qcow2
        bench -c 8 --flush-interval=4 -w -d 2 disk.qcow2
        bench -c 8 --flush-interval=2 disk.qcow2
        bench -c 8 --flush-interval=x -w disk.qcow2
        bench -c 8 --flush-interval=-1 -w disk.qcow2
        bench -c 8 --flush-interval=4 --no-drain -w -d 2 disk.qcow2
        bench -c 8 --no-drain -w disk.qcow2
        bench -c 8 --no-drain disk.qcow2
        bench -c 8 -n disk.qcow2
        bench -c 8 -i threads disk.qcow2
        bench -c 8 -i native disk.qcow2
        bench -c 8 -i nonsense disk.qcow2
        bench -c 8 -t writeback disk.qcow2
        bench -c 8 -t nonsense disk.qcow2
        bench -c 8 -U disk.qcow2
        bench -c 8 -f nothing disk.qcow2
        bench -c 8 -f qcow2 disk.raw
        bench -c 8 nowhere
        bench -c 8 disk.qcow2 disk.raw
        bench -c 8 bad-magic.qcow2
        bench -c 8 odd.raw
        bench -c 8 -w odd.raw
        bench -c 8 --image-opts driver=qcow2,file.filename=disk.qcow2
        bench -c 8 --image-opts driver=null-co,size=1M
        bench -c 8 --image-opts -f raw driver=null-co,size=1M
        bench -c 8 --nonsense disk.qcow2
        bench -c
    """),
    Row("bench -c 8 disk.qcow2", held="qemu-io disk.qcow2"),
    Row("bench -c 8 -U disk.qcow2", held="qemu-io disk.qcow2"),
    Row("bench -c 8 -w disk.qcow2", held="qemu-io -r disk.qcow2"),
    Row("bench -c 8 -w -n disk.qcow2", on_disk=True),
    Row("bench -c 8 -w -t none -i native disk.qcow2", on_disk=True),
)
