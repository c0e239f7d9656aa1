"""Our check and `qemu-img check` look at the same images: whole, leaked, and damaged in every way.

They count the same; what one repairs the other finds whole; no repair changes what the disk shows, nor does one that is
interrupted anywhere. VHOSTBLK_HUNT multiplies the images that are damaged at random.
"""

from __future__ import annotations

import asyncio
import errno
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.integration.test_qcow2_crash import Recorder, Recording
from tests.qcow2_images import (
    FOR_CHECK,
    MIB,
    SHAPES,
    check,
    contents,
    counts,
    create,
    our_check,
    qemu_check,
    qemu_img,
    qemu_io,
    scribble,
    with_image,
)
from tests.schedule import HUNT
from vhostblk.block.backend import BlockBackend
from vhostblk.block.check import check as check_node
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.drivers.qcow2.entries import COPIED, OFFSET_MASK
from vhostblk.block.drivers.qcow2.header import Header, Incompatible
from vhostblk.block.flags import CheckMode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError, ConfigError
from vhostblk.testing.plugin import ExpectedLog

ALL = int(CheckMode.FIX_LEAKS | CheckMode.FIX_ERRORS)
SIZE = 2 * MIB


class Image:
    """An image's file as bytes, with its tables by name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = bytearray(path.read_bytes())
        self.header = Header.parse(bytes(self.data[: 64 << 10]))
        self.l2 = self.number(self.header.l1_offset) & OFFSET_MASK
        self.block = self.number(self.header.refcount_table_offset)
        self.size = self.header.cluster_size

    def number(self, at: int) -> int:
        """Eight bytes."""
        return int.from_bytes(self.data[at : at + 8])

    def put(self, at: int, value: int) -> None:
        """Eight bytes."""
        self.data[at : at + 8] = (value & (1 << 64) - 1).to_bytes(8)

    def put_count(self, cluster: int, count: int) -> None:
        """A reference count of 16 bits."""
        at = self.block + 2 * cluster
        self.data[at : at + 2] = count.to_bytes(2)

    def host(self, index: int) -> int:
        """Where a cluster of the disk is."""
        return self.number(self.l2 + 8 * index) & OFFSET_MASK

    def save(self) -> None:
        """Into the file."""
        self.path.write_bytes(self.data)


def reading(path: Path, folder: Path) -> bytes | None:
    """What QEMU reads in an image; None: it cannot."""
    try:
        return contents(path, folder)
    except subprocess.CalledProcessError:
        return None


# ---------------------------------------------------------------------- whole images


@pytest.mark.parametrize("shape", SHAPES)
def test_image_that_is_whole_is_counted_as_qemu_counts_it(tmp_path: Path, shape: str) -> None:
    image = create(tmp_path / "i.qcow2", SIZE, "-o", SHAPES[shape])
    scribble(image, SIZE, 1, 15)
    if "1 bit" not in shape:
        qemu_img("snapshot", "-c", "s", image)
        scribble(image, SIZE, 2, 15)
    result = our_check(image)
    assert result.is_clean, result.messages
    assert counts(result) == qemu_check(image)


def test_compressed_clusters_bitmaps_and_data_files_are_counted_as_qemu_counts_them(
    tmp_path: Path,
) -> None:
    plain = create(tmp_path / "p.qcow2", SIZE, "-o", "cluster_size=4k")
    scribble(plain, SIZE, 3)
    compressed = tmp_path / "c.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", plain, compressed)
    bitmaps = create(tmp_path / "b.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_img("bitmap", "--add", bitmaps, "one")
    qemu_img("bitmap", "--add", "-g", "512", bitmaps, "two")
    scribble(bitmaps, SIZE, 4)
    words = f"data_file={tmp_path / 'd.raw'},data_file_raw=off"
    external = create(tmp_path / "e.qcow2", SIZE, "-o", words)
    scribble(external, SIZE, 5)
    for image in (compressed, bitmaps, external):
        result = our_check(image)
        assert result.is_clean, result.messages
        assert counts(result) == qemu_check(image), image.name


# ---------------------------------------------------------------------- one kind of damage each


def leak(image: Image) -> None:
    image.put_count(len(image.data) // image.size - 1, 1)
    image.put(image.l2 + 8, 0)


def count_too_high(image: Image) -> None:
    image.put_count(image.host(0) // image.size, 7)


def count_too_low(image: Image) -> None:
    image.put(image.l2 + 8 * 20, image.host(0))


def count_missing(image: Image) -> None:
    image.put_count(image.host(1) // image.size, 0)


def flag_missing(image: Image) -> None:
    image.put(image.l2, image.host(0))
    image.put(image.header.l1_offset, image.l2)


def flag_too_many(image: Image) -> None:
    count_too_low(image)
    image.put_count(image.host(0) // image.size, 2)


def unaligned_zeroes(image: Image) -> None:
    image.put(image.l2 + 8 * 30, (image.size * 3 + 512) | COPIED | 1)


def unaligned_data(image: Image) -> None:
    image.put(image.l2, (image.host(0) + 512) | COPIED)


def unaligned_table(image: Image) -> None:
    image.put(image.header.l1_offset, (image.l2 + 512) | COPIED)


def table_behind_the_end(image: Image) -> None:
    image.put(image.header.l1_offset, (len(image.data) + image.size) | COPIED)


def data_behind_the_end(image: Image) -> None:
    image.put(image.l2 + 8 * 40, (len(image.data) + 9 * image.size) | COPIED)


def reserved_bits(image: Image) -> None:
    image.put(image.l2, image.number(image.l2) | 1 << 60 | 2)
    image.put(image.header.l1_offset, image.number(image.header.l1_offset) | 1 << 60)


def data_where_a_table_is(image: Image) -> None:
    image.put(image.l2 + 8 * 50, image.header.l1_offset | COPIED)


def block_behind_the_end(image: Image) -> None:
    image.put(image.header.refcount_table_offset, len(image.data) + 5 * image.size)


def block_with_reserved_bits(image: Image) -> None:
    image.put(image.header.refcount_table_offset, image.block | 1)


def block_twice(image: Image) -> None:
    image.put(image.header.refcount_table_offset + 8, image.block)


def no_blocks(image: Image) -> None:
    image.put(image.header.refcount_table_offset, 0)


DAMAGES: list[Callable[[Image], None]] = [
    *(leak, count_too_high, count_too_low, count_missing, flag_missing, flag_too_many),
    *(unaligned_zeroes, unaligned_data, unaligned_table, table_behind_the_end),
    *(data_behind_the_end, reserved_bits, data_where_a_table_is, block_behind_the_end),
    *(block_with_reserved_bits, block_twice, no_blocks),
]
# Nobody knows what an entry meant that cannot be right.
NOT_REPAIRED = {
    *(unaligned_data, unaligned_table, table_behind_the_end, data_behind_the_end, reserved_bits),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_counted_as_by_qemu_and_repaired_without_changing_the_disk(
    tmp_path: Path, damage: Callable[[Image], None]
) -> None:
    path = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_io(path, "write -P 3 0 300k", "write -z 500k 64k", "write -P 4 1M 10k")
    image = Image(path)
    damage(image)
    image.save()
    before = reading(path, tmp_path)
    found = our_check(path)
    assert not found.is_clean
    assert counts(found) == qemu_check(path)
    assert path.read_bytes() == bytes(image.data)

    repaired = our_check(path, ALL)
    assert repaired.corruptions_fixed + repaired.leaks_fixed or damage in NOT_REPAIRED
    theirs = qemu_check(path)
    again = our_check(path)
    assert theirs == counts(again)
    assert before is None or reading(path, tmp_path) == before
    if damage not in NOT_REPAIRED:
        assert repaired.is_clean, repaired.messages
        assert again.is_clean, again.messages
        assert check(path) == ""

    image.save()
    subprocess.run(
        ["qemu-img", "check", "-q", "-r", "all", path], check=False, capture_output=True, timeout=60
    )
    assert counts(our_check(path)) == qemu_check(path)


def test_table_that_two_parts_of_the_disk_share_is_written_after_a_repair_and_not_before(
    tmp_path: Path, expect_log: ExpectedLog
) -> None:
    expect_log.expect("L2 table overlaps another table")
    path = create(tmp_path / "i.qcow2", 4 * SIZE, "-o", "cluster_size=4k")
    qemu_io(path, "write -P 3 0 300k")
    image = Image(path)
    image.put(image.header.l1_offset + 8, image.l2 | COPIED)
    image.save()

    async def refused(backend: BlockBackend) -> None:
        with pytest.raises(BlockError, match="corrupt"):
            await backend.pwritev(SIZE + MIB, IoVec.of(b"\7" * 4096))

    with_image(path, refused)
    image.save()
    assert counts(our_check(path)) == qemu_check(path)
    assert our_check(path, ALL).is_clean
    assert check(path) == ""

    async def write(backend: BlockBackend) -> None:
        await backend.pwritev(SIZE, IoVec.of(b"\7" * 8192))
        await backend.pwritev(4096, IoVec.of(b"\6" * 8192))

    with_image(path, write)
    # Who is left alone with a cluster does not know that.
    left = our_check(path)
    assert counts(left) == qemu_check(path)
    assert all("OFLAG_COPIED" in message for message in left.messages)
    assert our_check(path, ALL).is_clean
    assert check(path) == ""
    data = contents(path, tmp_path)
    assert data[:16384:4096] == b"\3\6\6\3"
    assert data[SIZE : SIZE + 16384 : 4096] == b"\7\7\3\3"


@pytest.mark.parametrize("target", ["header", "L1", "counts", "table of counts"])
def test_other_table_that_is_said_to_be_an_l2_table_is_not_changed_by_a_repair(
    tmp_path: Path, target: str
) -> None:
    path = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_io(path, "write -P 3 0 300k")
    image = Image(path)
    header = image.header
    places = {"header": 0, "L1": header.l1_offset, "counts": image.block}
    place = places.get(target, header.refcount_table_offset)
    image.put(header.l1_offset, place | COPIED)
    image.save()
    assert counts(our_check(path)) == qemu_check(path)
    our_check(path, ALL)
    after = path.read_bytes()
    # Flags in it are not there to be made right; but where counts are is changed if others are there, too.
    assert after[:48] == bytes(image.data[:48])
    assert after[60:112] == bytes(image.data[60:112])
    left = our_check(path)
    assert not left.check_errors
    assert counts(left) == qemu_check(path)


def test_leaks_are_repaired_alone_but_errors_are_not(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_io(path, "write -P 3 0 300k")
    for with_error in (False, True):
        image = Image(path)
        good = bytes(image.data)
        count_too_high(image)
        image.put_count(image.host(5) // image.size, 3)
        # Their flags were right for the counts: they are changed with them, if that is all there is to repair.
        image.put(image.l2, image.host(0))
        if with_error:
            image.put(image.l2 + 8 * 200, image.host(3) | COPIED)
        image.save()
        found = our_check(path, int(CheckMode.FIX_LEAKS))
        assert (found.leaks, found.leaks_fixed) == (0, 2)
        assert (found.corruptions, found.corruptions_fixed) == ((2, 0) if with_error else (0, 1))
        assert counts(our_check(path)) == qemu_check(path)
        path.write_bytes(good)


def test_leaks_are_not_repaired_where_counts_have_to_be_written_anew(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_io(path, "write -P 3 0 300k")
    image = Image(path)
    count_missing(image)
    image.save()
    found = our_check(path, int(CheckMode.FIX_LEAKS))
    assert found.check_errors == 1
    assert path.read_bytes() == bytes(image.data)


def test_compressed_clusters_that_overlap_data_are_found_and_repaired(tmp_path: Path) -> None:
    plain = create(tmp_path / "p.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_io(plain, "write -P 3 0 300k")
    path = tmp_path / "c.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", "cluster_size=4k", plain, path)
    qemu_io(path, "write -P 8 512k 64k")
    image = Image(path)
    image.put(image.l2 + 8 * 200, (image.number(image.l2) & OFFSET_MASK & -4096) | COPIED)
    image.put(image.l2 + 8, image.number(image.l2 + 8) | COPIED)
    image.save()
    found = our_check(path)
    assert counts(found) == qemu_check(path)
    assert found.corruptions > 2
    our_check(path, ALL)
    assert counts(our_check(path)) == qemu_check(path)


def test_bitmap_that_is_damaged_is_counted_as_by_qemu(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_img("bitmap", "--add", "-g", "512", path, "one")
    qemu_io(path, "write -P 3 0 300k")
    image = Image(path)
    at = next(
        at
        for at in range(0, len(image.data), 4096)
        if image.number(at)
        and not image.number(at) % 4096
        and image.number(at) < len(image.data)
        and at not in (image.header.refcount_table_offset,)
    )
    image.put(at, image.number(at) | 6)
    image.save()
    assert counts(our_check(path)) == qemu_check(path)


# ---------------------------------------------------------------------- at random


def damage_at_random(image: Image, rnd: random.Random) -> None:
    """Wrong entries and counts, in tables of all kinds."""
    header, size = image.header, image.size
    l1 = range(header.l1_offset, header.l1_offset + 8 * header.l1_entries, 8)
    tables = [table for at in l1 if (table := image.number(at) & OFFSET_MASK)]
    table = header.refcount_table_offset
    named = [image.number(at) for at in range(table, table + size, 8)]
    blocks = [block for block in named if block]
    for _ in range(rnd.choice([1, 1, 1, 2, 4])):
        kind = rnd.choice("lLLLLrrrrRtt")
        if kind in "rR":
            reach = size if kind == "R" else min(size, 128)
            image.data[rnd.choice(blocks) + rnd.randrange(reach)] = rnd.choice([0, 0, 1, 2, 255])
            continue
        if kind == "l":
            at = rnd.choice(l1)
        elif kind == "L":
            at = rnd.choice(tables) + 8 * rnd.randrange(min(size // 8, 600))
        else:
            at = table + 8 * rnd.randrange(min(size // 8, 4))
        old = image.number(at)
        place = rnd.choice([header.l1_offset, table, *blocks, *tables])
        behind = (len(image.data) // size + rnd.randrange(3)) * size
        choices = [
            0,
            old ^ COPIED,
            old ^ 1 << rnd.randrange(63),
            old + size,
            old | 1,
            old | 1 << 62,
        ]
        choices += [place | (COPIED if kind != "t" else 0), behind | (COPIED if kind != "t" else 0)]
        image.put(at, rnd.choice(choices))


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if "all" not in shape])
def test_random_damage_is_counted_and_repaired_as_by_qemu(tmp_path: Path, shape: str) -> None:
    path = create(tmp_path / "i.qcow2", SIZE, "-o", SHAPES[shape])
    scribble(path, SIZE, 1, 15)
    if "1 bit" not in shape:
        qemu_img("snapshot", "-c", "s", path)
        scribble(path, SIZE, 2, 15)
    good = path.read_bytes()
    for seed in range(3 * HUNT):
        path.write_bytes(good)
        image = Image(path)
        damage_at_random(image, random.Random(seed))
        image.save()
        try:
            check_both(image, tmp_path)
        except BaseException as error:
            error.add_note(f"seed: {seed}")
            raise


def check_both(image: Image, folder: Path) -> None:
    """Count, repair, and let the other one look."""
    path = image.path
    theirs = qemu_check(path)
    try:
        ours = our_check(path)
    except ConfigError:
        assert theirs is None
        return
    assert counts(ours) == theirs
    before = reading(path, folder)
    our_check(path, ALL)
    after = our_check(path)
    assert counts(after) == qemu_check(path)
    # Only entries are left that mean nothing.
    assert not after.leaks
    assert not after.check_errors
    assert after.corruptions <= ours.corruptions
    assert before is None or reading(path, folder) == before


# ---------------------------------------------------------------------- snapshot tables


def l1_table_unaligned(image: Image) -> None:
    image.put(image.header.snapshots_offset, 0x40_0200)


def l1_table_too_large(image: Image) -> None:
    at = image.header.snapshots_offset + 8
    image.data[at : at + 4] = (1 << 28).to_bytes(4)


def entry_incomplete(image: Image) -> None:
    """No extra data; what was there is a part of the name."""
    at = image.header.snapshots_offset + 12
    image.data[at : at + 4] = (1).to_bytes(2) + (25).to_bytes(2)
    image.data[at + 24 : at + 28] = bytes(4)


def extra_data_too_large(image: Image) -> None:
    at = image.header.snapshots_offset + 36
    image.data[at : at + 4] = (2048).to_bytes(4)


def too_many(image: Image) -> None:
    image.data[60:64] = (65537).to_bytes(4)


def table_unaligned(image: Image) -> None:
    image.put(64, image.header.snapshots_offset + 512)


@pytest.mark.parametrize(
    ("damage", "is_repaired"),
    [
        (l1_table_unaligned, False),
        (l1_table_too_large, None),
        (entry_incomplete, True),
        (extra_data_too_large, True),
        (too_many, None),
        (table_unaligned, False),
    ],
)
def test_damaged_table_of_snapshots_is_found_and_repaired_as_by_qemu(
    tmp_path: Path, damage: Callable[[Image], None], is_repaired: bool | None
) -> None:
    path = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=4k")
    qemu_io(path, "write -P 3 0 300k")
    qemu_img("snapshot", "-c", "s", path)
    qemu_io(path, "write -P 4 0 100k")
    image = Image(path)
    damage(image)
    outputs: list[tuple[int, list[str]]] = []
    # Of what is left out QEMU makes something worse.
    for fix in ([], ["-r", "leaks"], ["-r", "all"], []) if is_repaired is not None else ([],):
        said = []
        for program in (["qemu-img"], [sys.executable, "-m", "vhostblk", "img"]):
            copy = tmp_path / "copy.qcow2"
            if outputs and not fix:
                copy = tmp_path / f"repaired by {program[0].rpartition('/')[2]}"
            else:
                image.path = copy
                image.save()
            words = [*program, "check", *fix, str(copy)]
            run = subprocess.run(words, check=False, capture_output=True, text=True, timeout=60)
            text = run.stdout + run.stderr
            lines = text.replace("vhostblk-img:", "qemu-img:").splitlines()
            # Where a new table is, is not the same.
            lines = [line for line in lines if not line.startswith("Image end offset")]
            said.append((run.returncode, sorted(lines) if fix else lines))
            if fix[1:] == ["all"]:
                copy.rename(tmp_path / f"repaired by {program[0].rpartition('/')[2]}")
        assert said[0] == said[1]
        outputs.append(said[1])
    assert outputs[0][0] != 0
    assert (outputs[-1][0] == 0) is bool(is_repaired)


# ---------------------------------------------------------------------- interrupted repairs


@pytest.mark.parametrize("damage", [leak, count_too_low, flag_too_many, count_missing, block_twice])
def test_repair_that_is_interrupted_makes_nothing_worse(
    tmp_path: Path, damage: Callable[[Image], None]
) -> None:
    path = create(tmp_path / "i.qcow2", SIZE, "-o", "cluster_size=4k")
    scribble(path, SIZE, 7, 10)
    qemu_io(path, "write -P 3 0 300k", "write -P 4 1M 10k")
    image = Image(path)
    damage(image)
    count_too_high(image)
    image.save()
    before = contents(path, tmp_path)
    log: Recording = []

    async def repair() -> None:
        graph = BlockGraph({**DRIVERS, "recorder": Recorder})
        options = {
            "driver": "qcow2",
            "file": {"driver": "recorder", "file": {"driver": "file", "filename": str(path)}},
        }
        node = await graph.open_image(None, options, flags=FOR_CHECK)
        recorder = node.children["file"].node
        assert isinstance(recorder, Recorder)
        recorder.log = log
        assert (await check_node(node, CheckMode(ALL))).is_clean
        await graph.close_all()

    asyncio.run(repair())
    assert check(path) == ""
    worst = qemu_corruptions(image)
    rnd = random.Random(1)
    ends = range(len(log) + 1)
    for end in ends:
        path.write_bytes(state_after(bytes(image.data), log, end, rnd))
        found = our_check(path)
        assert not found.check_errors
        # Flags follow counts: what was a leak may be a flag for a moment.
        assert found.corruptions <= worst
        assert contents(path, tmp_path) == before
        assert our_check(path, ALL).is_clean
        assert check(path) == ""
        assert contents(path, tmp_path) == before


def qemu_corruptions(image: Image) -> int:
    """Errors and leaks: each leak may have its flags to be changed, at two levels."""
    image.save()
    found = qemu_check(image.path)
    assert found is not None
    return found["corruptions"] + 2 * found["leaks"]


def state_after(before: bytes, log: Recording, end: int, rnd: random.Random) -> bytes:
    """All that was written before the last flush, and some of what came later."""
    flushes = [at for at in range(end) if log[at] is None]
    safe = flushes[-1] if flushes else 0
    file = bytearray(before)
    for at, entry in enumerate(log[:end]):
        if entry is not None and (at < safe or rnd.random() < 0.6):
            assert not isinstance(entry, int), "no repair changes the file's length by itself"
            offset, data = entry
            file.extend(bytes(max(offset + len(data) - len(file), 0)))
            file[offset : offset + len(data)] = data
    return bytes(file)


# ---------------------------------------------------------------------- the node


def test_image_that_is_in_use_is_checked_and_repaired_between_requests(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(path, "write -P 3 0 300k")
    image = Image(path)
    count_too_high(image)
    image.save()

    async def run() -> None:
        graph = BlockGraph(DRIVERS)
        node = await graph.open_image(str(path))
        backend = BlockBackend(node, "the guest", writable=True)
        for number in range(8):
            await backend.pwritev(MIB + number * 65536, IoVec.of(bytes([number + 1]) * 65536))
        assert (await check_node(node)).leaks == 1
        assert (await check_node(node, CheckMode(ALL))).leaks_fixed == 1
        assert (await check_node(node)).is_clean
        for number in range(8):
            await backend.pwritev(number * 65536, IoVec.of(bytes([number + 1]) * 65536))
        await backend.close()
        await graph.close_all()

    asyncio.run(run())
    assert check(path) == ""
    data = contents(path, tmp_path)
    assert data[:SIZE:65536] == bytes([*range(1, 9), *bytes(8), *range(1, 9), *bytes(8)])


def test_check_of_a_corrupt_image_clears_the_mark_only_if_all_is_well(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(path, "write -P 3 0 300k")
    for damage in (unaligned_data, count_too_low):
        image = Image(path)
        good = bytes(image.data)
        damage(image)
        image.data[79] |= Incompatible.CORRUPT
        image.save()
        our_check(path, ALL)
        header = Header.parse(path.read_bytes()[:65536])
        is_left = damage is unaligned_data
        assert bool(header.incompatible & Incompatible.CORRUPT) is is_left
        path.write_bytes(good)


def test_node_that_was_opened_to_be_checked_is_not_written(tmp_path: Path) -> None:
    path = create(tmp_path / "i.qcow2", SIZE)
    qemu_io(path, "write -P 3 0 300k")
    before = path.read_bytes()

    async def run() -> None:
        graph = BlockGraph(DRIVERS)
        node = await graph.open_image(str(path), flags=FOR_CHECK)
        backend = BlockBackend(node, "somebody", writable=True, resize=True)
        data = bytearray(4096)
        await backend.preadv(0, IoVec.of(data))
        assert data == b"\3" * 4096
        for work in (
            backend.pwritev(0, IoVec.of(bytes(4096))),
            backend.pwrite_zeroes(0, 65536),
            backend.truncate(2 * SIZE),
        ):
            with pytest.raises(BlockError) as caught:
                await work
            assert caught.value.errno == errno.EPERM
        await backend.close()
        await graph.close_all()

    asyncio.run(run())
    assert path.read_bytes() == before


# ---------------------------------------------------------------------- bounds


def test_sparse_image_that_refers_everywhere_costs_bounded_memory_and_time(tmp_path: Path) -> None:
    """Each entry names another place of a file of many terabytes, most of which is holes."""
    path = create(tmp_path / "i.qcow2", 64 << 30)
    qemu_io(path, "write 0 64k")
    image = Image(path)
    far = 2 << 40
    for index in range(2048):
        image.put(image.l2 + 8 * index, (1 << 32) + index * (far >> 11))
    for index in range(1, 128):
        image.put(image.header.l1_offset + 8 * index, (1 << 40) + index * 65536)
    image.save()
    with path.open("r+b") as file:
        file.truncate(far + (1 << 40))
    tracemalloc.start()
    try:
        found = our_check(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    # What is referred to and not counted: data, L2 tables.
    assert found.corruptions >= 2048 + 127
    assert peak < 64 * MIB
