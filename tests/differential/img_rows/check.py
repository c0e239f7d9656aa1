"""Rows of `check`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

# What is found in tables, and what becomes of it.
_TABLES = (
    *("disk", "v2", "top", "small-clusters", "subclusters", "compressed", "zstd", "external"),
    *("snapshots", "bitmaps", "in-use", "dirty", "corrupt", "autoclear", "orphan", "terabyte"),
    *("leak", "refcount-low", "refcount-high", "l2-misplaced", "l2-reserved", "l2-beyond"),
    *("cut-l1", "cut-data", "mislabelled"),
)

ROWS = (
    *rows("""
        check
        check disk.qcow2 disk.qcow2
        check nowhere.qcow2
        check disk.raw
        check -f raw disk.qcow2
        check -f qcow2 disk.raw
        check --format qcow2 disk.qcow2
        check -q disk.qcow2
        check -q leak.qcow2
        check -q refcount-high.qcow2
        check --output human disk.qcow2
        check --output yaml disk.qcow2
        check --output=json disk.qcow2
        check --output=json -q disk.qcow2
        check --output=json leak.qcow2
        check --output=json compressed.qcow2
        check --output=json refcount-low.qcow2
        check --output=json -r all refcount-low.qcow2
        check --output=json -r leaks leak.qcow2
        check -q -r all leak.qcow2
        check -r nothing disk.qcow2
        check -r
        check --repair=all refcount-high.qcow2
        check -T none disk.qcow2
        check -T nothing disk.qcow2
        check -U disk.qcow2
        check -r all -f raw disk.raw
        check --image-opts driver=qcow2,file.filename=disk.qcow2
        check --image-opts -f qcow2 driver=qcow2,file.filename=disk.qcow2
        check --object throttle-group,id=t disk.qcow2
        check -p disk.qcow2
    """),
    *(Row(f"check {name}.qcow2") for name in _TABLES),
    *(Row(f"check -r leaks {name}.qcow2") for name in _TABLES),
    *(Row(f"check -r all {name}.qcow2") for name in _TABLES),
    # A block of counts is where nothing can be read, or nothing is and nothing need be.
    *(
        Row(f"check {options}disk.qcow2", given=["poke disk.qcow2 0x10000 8000000000020000"])
        for options in ("", "--output=json ")
    ),
    Row("check -r leaks leak.qcow2", given=["poke leak.qcow2 0x10008 0000001000000000"]),
    # Clusters that are used twice, where a count cannot be 2.
    Row(
        "check narrow.qcow2",
        given=[
            "qemu-img create -f qcow2 -o refcount_bits=1 narrow.qcow2 1M",
            "qemu-io narrow.qcow2 -c 'write 0 256k'",
            "poke narrow.qcow2 0x40010 80000000000500008000000000060000",
        ],
    ),
    Row("check disk.qcow2", held="qemu-io disk.qcow2"),
    Row("check -f raw disk.raw", held="qemu-io -f raw disk.raw"),
    Row("check -U disk.qcow2", held="qemu-io disk.qcow2"),
    Row("check -r all disk.qcow2", held="qemu-io -r disk.qcow2"),
)
