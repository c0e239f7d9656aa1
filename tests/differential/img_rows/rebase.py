"""Rows of `rebase`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

_THROTTLED = (
    "--object throttle-group,id=x "
    "--image-opts driver=throttle,throttle-group=x,file.driver=qcow2,file.file.filename=top.qcow2"
)

ROWS = (
    *rows("""
        # words
        rebase
        rebase top.qcow2
        rebase -b base.qcow2
        rebase -b base.qcow2 top.qcow2 mid.qcow2
        rebase -b
        rebase -z
        rebase -t foo -b base.qcow2 -F qcow2 top.qcow2
        rebase -T foo -b base.qcow2 -F qcow2 top.qcow2
        rebase -p -T foo -b base.qcow2 -F qcow2 top.qcow2
        rebase -b base.qcow2 -F foo top.qcow2
        rebase -p -b base.qcow2 -F foo top.qcow2
        rebase -p -b base.qcow2 -F foo nowhere.qcow2
        rebase --image-opts -f qcow2 -b base.qcow2 -F qcow2 driver=qcow2,file.filename=top.qcow2
        # names only
        rebase -u top.qcow2
        rebase -u -b "" top.qcow2
        rebase -u -b "" -F qcow2 top.qcow2
        rebase -u -F qcow2 top.qcow2
        rebase -u -b base.qcow2 -F qcow2 top.qcow2
        rebase -u -p -b base.qcow2 -F qcow2 top.qcow2
        rebase -u -p -q -b base.qcow2 -F qcow2 top.qcow2
        rebase -u -b nowhere.qcow2 -F raw top.qcow2
        rebase -u -b nowhere.qcow2 top.qcow2
        rebase -u -b base.qcow2 -F qcow2 orphan.qcow2
        rebase -u -b base.qcow2 -F qcow2 new.qcow2
        rebase -u -b base.qcow2 -F qcow2 v2.qcow2
        rebase -u -b base.qcow2 -F qcow2 --image-opts driver=qcow2,file.filename=top.qcow2
        # what is not possible
        rebase -b base.qcow2 -F qcow2 nowhere.qcow2
        rebase -b base.qcow2 -F qcow2 orphan.qcow2
        rebase -b nowhere.qcow2 top.qcow2
        rebase -p -b nowhere.qcow2 -F qcow2 top.qcow2
        rebase -f raw -b base.qcow2 -F qcow2 zeroes.raw
        rebase -f raw -u -b base.qcow2 -F qcow2 zeroes.raw
        rebase -f raw -u -b "" zeroes.raw
        rebase -f raw -u zeroes.raw
        rebase -b top.qcow2 -F qcow2 top.qcow2
        # what is done
        rebase -b "" top.qcow2
        rebase -b "" -F qcow2 top.qcow2
        rebase -p -q -b "" top.qcow2
        rebase -b base.qcow2 -F qcow2 top.qcow2
        rebase -U -b base.qcow2 -F qcow2 top.qcow2
        rebase -t none -T none -b base.qcow2 -F qcow2 top.qcow2
        rebase -b ./base.qcow2 -F qcow2 top.qcow2
        rebase -b file:base.qcow2 -F qcow2 top.qcow2
        rebase -b zeroes.raw -F raw top.qcow2
        rebase -b new.qcow2 -F qcow2 top.qcow2
        rebase -b base.qcow2 -F qcow2 new.qcow2
        rebase -b base.qcow2 -F qcow2 --image-opts driver=qcow2,file.filename=top.qcow2
        rebase -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}' -F qcow2 top.qcow2
    """),
    *(Row(f"rebase -u -b {'x' * length} -F qcow2 top.qcow2") for length in (1023, 1024)),
    Row(f"rebase -u -b base.qcow2 -F qcow2 {_THROTTLED}"),
    Row("rebase -u -b moved.qcow2 -F qcow2 mid.qcow2", given=["mv base.qcow2 moved.qcow2"]),
    Row("rebase -b moved.qcow2 -F qcow2 mid.qcow2", given=["mv base.qcow2 moved.qcow2"]),
    Row("rebase -b new.qcow2 -F qcow2 top.qcow2", held="qemu-io -r new.qcow2"),
    Row("rebase -b new.qcow2 -F qcow2 top.qcow2", held="qemu-io new.qcow2"),
    Row("rebase -U -b new.qcow2 -F qcow2 top.qcow2", held="qemu-io new.qcow2"),
    Row("rebase -U -b new.qcow2 -F qcow2 top.qcow2", held="qemu-io top.qcow2"),
    Row(
        "rebase -b disk.qcow2 -F qcow2 top.qcow2",
        differs="where the old backing file has zeroes, the image gets zero clusters, not clusters of zeroes",
    ),
    Row(
        "rebase -b base.qcow2 -F raw top.qcow2",
        differs="the new backing file is opened in the format that was given, also if it is in the chain in another: "
        "stock qemu-img writes that format into the image, which shows something else from then on",
    ),
    # Option by option, as the manual has them.
    *rows("""
        rebase -q -b base.qcow2 -F qcow2 top.qcow2
        rebase -p -b base.qcow2 -F qcow2 top.qcow2
        rebase -f qcow2 -b base.qcow2 -F qcow2 top.qcow2
        rebase -b mid.qcow2 -F qcow2 top.qcow2
        rebase -b disk.raw -F raw disk.qcow2
        rebase -b short.raw -F raw top.qcow2
        rebase -b large.raw -F raw top.qcow2
        rebase -b empty.raw -F raw top.qcow2
        rebase -b odd.raw -F raw top.qcow2
        rebase -b base.qcow2 -F nothing top.qcow2
        rebase -b base.qcow2 -F '' top.qcow2
        rebase -b '' top.qcow2
        rebase -b '' mid.qcow2
        rebase -b '' disk.qcow2
        rebase -b '' over-raw.qcow2
        rebase -b '' -F qcow2 top.qcow2
        rebase -b nowhere top.qcow2
        rebase -b nowhere -F qcow2 top.qcow2
        rebase -b . -F qcow2 top.qcow2
        rebase -b bad-magic.qcow2 -F qcow2 top.qcow2
        rebase -b feature.qcow2 -F qcow2 top.qcow2
        rebase -b orphan.qcow2 -F qcow2 top.qcow2
        rebase -b base.qcow2 -F qcow2 nowhere
        rebase -b base.qcow2 -F qcow2 disk.raw
        rebase -f raw -b base.qcow2 -F qcow2 disk.raw
        rebase -f nothing -b base.qcow2 -F qcow2 top.qcow2
        rebase -f raw -b base.qcow2 -F qcow2 top.qcow2
        rebase -u -b base.qcow2 top.qcow2
        rebase -u -b nowhere -F qcow2 top.qcow2
        rebase -u -b nowhere top.qcow2
        rebase -u -b nowhere -F nothing top.qcow2
        rebase -u -b nowhere -F raw orphan.qcow2
        rebase -u -b '' top.qcow2
        rebase -u -b '' orphan.qcow2
        rebase -u -b '' -F qcow2 top.qcow2
        rebase -u -b base.qcow2 -F qcow2 disk.raw
        rebase -u -q -b base.qcow2 -F qcow2 top.qcow2
        rebase -u -b base.qcow2 -F qcow2 self.qcow2
        rebase -u -b base.qcow2 -F qcow2 corrupt.qcow2
        rebase -u -b base.qcow2 -F qcow2 small-clusters.qcow2
        rebase -u -b 'json:{"driver":"qcow2","file":{"driver":"file","filename":"base.qcow2"}}' -F qcow2 top.qcow2
        rebase -b base.qcow2 -F qcow2 subclusters.qcow2
        rebase -b base.qcow2 -F qcow2 compressed.qcow2
        rebase -b base.qcow2 -F qcow2 snapshots.qcow2
        rebase -b base.qcow2 -F qcow2 external.qcow2
        rebase -b base.qcow2 -F qcow2 external-raw.qcow2
        rebase -b base.qcow2 -F qcow2 unlabelled.qcow2
        rebase -t none -b base.qcow2 -F qcow2 top.qcow2
        rebase -t nonsense -b base.qcow2 -F qcow2 top.qcow2
        rebase -T writethrough -b base.qcow2 -F qcow2 top.qcow2
        rebase -T nonsense -b base.qcow2 -F qcow2 top.qcow2
        rebase -b base.qcow2 -F qcow2 top.qcow2 mid.qcow2
        rebase -b base.qcow2 -b mid.qcow2 -F qcow2 top.qcow2
        rebase --image-opts -b base.qcow2 -F qcow2 driver=qcow2,file.filename=top.qcow2
        rebase --image-opts -b base.qcow2 -F qcow2 top.qcow2
        rebase -b base.qcow2 -F qcow2 'json:{"driver":"qcow2","file":{"driver":"file","filename":"top.qcow2"}}'
        rebase --object nothing,id=x -b base.qcow2 -F qcow2 top.qcow2
        rebase --nonsense -b base.qcow2 top.qcow2
    """),
    *rows(
        """
        rebase -b base.qcow2 top.qcow2
        """,
        differs="ours refuses before anything is copied",
    ),
    *rows(
        """
        rebase -b disk.raw -F raw top.qcow2
        """,
        differs="zeroes are written as zero clusters, by qemu-img as data",
    ),
    Row(
        "rebase -b base.qcow2 -F qcow2 larger.qcow2",
        given=[
            "qemu-img create -f qcow2 -b mid.qcow2 -F qcow2 larger.qcow2 2M",
            "qemu-io larger.qcow2 -c 'write -P 9 1536k 64k'",
        ],
    ),
    Row("rebase -b base.qcow2 -F qcow2 top.qcow2", held="qemu-io base.qcow2"),
    Row("rebase -b base.qcow2 -F qcow2 top.qcow2", held="qemu-io -r base.qcow2"),
    Row("rebase -b base.qcow2 -F qcow2 top.qcow2", held="qemu-io -r top.qcow2"),
    Row("rebase -U -b base.qcow2 -F qcow2 top.qcow2", held="qemu-io -r top.qcow2"),
    Row("rebase -u -b base.qcow2 -F qcow2 top.qcow2", held="qemu-io base.qcow2"),
    Row("rebase -u -b base.qcow2 -F qcow2 top.qcow2", held="qemu-io -r top.qcow2"),
    Row("rebase -b base.qcow2 -F qcow2 top.qcow2", process=True),
    Row("rebase -t none -T none -b base.qcow2 -F qcow2 top.qcow2", on_disk=True),
)
