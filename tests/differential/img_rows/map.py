"""Rows of `map`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    *rows("""
        map
        map -q disk.raw
        map disk.raw disk.raw
        map nowhere.raw
        map disk.raw
        map -f raw disk.raw
        map --format=raw --output=json disk.raw
        map --output=yaml disk.raw
        map --output json empty.raw
        map empty.raw
        map --output=json zeroes.raw
        map --output=json odd.raw
        map -f raw odd.raw
        map disk.qcow2
        map --output=json disk.qcow2
        map --output=json v2.qcow2
        map -f raw disk.qcow2
        map --output=json -f qcow2 disk.raw
        map top.qcow2
        map --output=json top.qcow2
        map over-raw.qcow2
        map --output=json over-raw.qcow2
        map orphan.qcow2
        map --output=json small-clusters.qcow2
        map --output=json subclusters.qcow2
        map subclusters.qcow2
        map compressed.qcow2
        map --output=json compressed.qcow2
        map --output=json zstd.qcow2
        map --output=json external.qcow2
        map external.qcow2
        map --image-opts driver=qcow2,file.filename=disk.qcow2
        map --image-opts -f qcow2 driver=qcow2,file.filename=disk.qcow2
        map --output=json "json:{\\"driver\\":\\"raw\\",\\"offset\\":65536,\\"file\\":{\\"filename\\":\\"disk.raw\\"}}"
        map "json:{\\"driver\\":\\"raw\\",\\"offset\\":65536,\\"file\\":{\\"filename\\":\\"disk.raw\\"}}"
        map -s 100k disk.raw
        map -s 100k -l 64k --output=json disk.raw
        map --start-offset=512k --max-length 1G --output=json disk.qcow2
        map -s 2M disk.raw
        map -s 2M --output=json disk.raw
        map -s 1 -l 5 --output=json disk.qcow2
        map -s 1 -l 5 --output=json disk.raw
        map -s -1 disk.raw
        map -s x disk.raw
        map -l x disk.raw
        map -l 9E disk.raw
        map -s 7E -l 7E disk.raw
        map -l 0 --output=json disk.raw
        map -U disk.qcow2
        map --nothing disk.raw
        map -l
        map --output=json l2-reserved.qcow2
        map --output=json l2-misplaced.qcow2
        map l2-beyond.qcow2
    """),
    Row("map -U disk.qcow2", held="qemu-io disk.qcow2"),
    Row("map disk.qcow2", held="qemu-io disk.qcow2"),
    Row("map -f raw disk.raw", held="qemu-io -f raw disk.raw"),
    Row("map --output=json top.qcow2", process=True),
    *rows(
        """
        map --output=json one.qcow2
        map one.qcow2
        """,
        given=["qemu-img create -f qcow2 -b short.raw -F raw one.qcow2 1M"],
    ),
    *rows(
        """
        map --output=json full.qcow2
        map full.qcow2
        """,
        given=[
            "qemu-img create -f qcow2 -o preallocation=metadata full.qcow2 1M",
            "qemu-io full.qcow2 -c 'write 100k 100k'",
        ],
    ),
    *rows(
        """
        map --output=json many.qcow2
        map many.qcow2
        compare many.qcow2 new.qcow2
        check many.qcow2
        """,
        given=[
            "qemu-img create -f qcow2 -o cluster_size=512 many.qcow2 1M",
            "qemu-io many.qcow2 -c 'write -z 9k 1k' -c 'write 700k 512' -c 'write 300k 512' -c 'write 3k 2k'"
            " -c 'write -z 700k 1k' -c 'write 701k 1k' -c 'discard 300k 512' -c 'write 2k 1k'",
        ],
    ),
    Row(
        "map --output=json external.qcow2",
        given=["qemu-io external.qcow2 -c 'write 0 128k' -c 'write -z 0 128k'"],
    ),
)
