"""qcow2 images that grow and shrink, against QEMU (row B31)."""

from __future__ import annotations

import errno
import json
import os
import random
from pathlib import Path

import pytest

from tests.qcow2_images import (
    MIB,
    SHAPES,
    check,
    contents,
    create,
    qemu_img,
    qemu_io,
    read,
    scribble,
    with_image,
)
from vhostblk.block.backend import BlockBackend
from vhostblk.block.flags import Preallocation
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError
from vhostblk.testing.requirements import require

SIZE = 4 * MIB + 3584


@pytest.fixture(autouse=True)
def needs_qemu() -> None:
    require("qemu-img", "qemu-io")


def resize(image: Path, *sizes: int, mode: Preallocation = Preallocation.OFF) -> None:
    """One length after the other; what is below and above the end is what it should be, each time."""

    async def scenario(backend: BlockBackend) -> None:
        for size in sizes:
            before = backend.length
            kept = await read(backend, 0, min(size, before))
            await backend.truncate(size, mode if size > before else Preallocation.OFF)
            assert backend.length == size
            assert await read(backend, 0, size) == kept.ljust(size, b"\0")

    with_image(image, scenario)


def allocated(image: Path) -> int:
    """Bytes of the disk that have a place."""
    return sum(
        extent["length"]
        for extent in json.loads(qemu_img("map", "--output=json", image))
        if "offset" in extent
    )


@pytest.mark.parametrize("backing", [False, True])
@pytest.mark.parametrize(
    "shape",
    ["version 2", "512 byte clusters", "64 KiB clusters", "2 MiB clusters", "subclusters of 2 KiB"],
)
def test_disk_shrinks_and_grows_and_nothing_of_the_past_shows(
    tmp_path: Path, shape: str, backing: bool
) -> None:
    image = tmp_path / "disk"
    words = ["-o", SHAPES[shape]]
    if backing:
        (tmp_path / "base").write_bytes(os.urandom(3 * MIB))
        words += ["-b", "base", "-F", "raw"]
    create(image, SIZE, *words)
    scribble(image, SIZE, len(shape))
    expected = contents(image, tmp_path)
    sizes = [2 * MIB + 512, 2 * MIB + 66048, 6 * MIB, MIB // 2, 0, 3 * MIB, 700 * 1024 + 512]
    resize(image, *sizes)
    for size in sizes:
        expected = expected[:size].ljust(size, b"\0")
    assert check(image) == ""
    assert contents(image, tmp_path) == expected


@pytest.mark.parametrize("mode", list(Preallocation))
@pytest.mark.parametrize("shape", SHAPES)
def test_disk_of_no_bytes_grows_although_it_has_no_table(
    tmp_path: Path, shape: str, mode: Preallocation
) -> None:
    image = create(tmp_path / "disk", 0, "-o", SHAPES[shape])
    resize(image, 3 * MIB, mode=mode)
    qemu_io(image, "read -P 0 0 3M", "write -P 1 2M 64k")
    assert check(image) == ""


@pytest.mark.parametrize("shape", ["4 KiB clusters", "subclusters of 2 KiB", "512 byte clusters"])
def test_shrunk_file_is_as_small_as_when_qemu_shrinks_it(tmp_path: Path, shape: str) -> None:
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    create(ours, 32 * MIB, "-o", SHAPES[shape])
    unit = MIB // 8 if "512" in shape else MIB
    qemu_io(ours, f"write -P 1 0 {20 * unit}", f"write -P 2 {30 * unit} {2 * unit}")
    theirs.write_bytes(ours.read_bytes())
    for size in (31 * unit, 8 * unit + 512, 512):
        resize(ours, size)
        qemu_img("resize", "-q", "--shrink", "-f", "qcow2", theirs, size)
        assert check(ours) == ""
        assert allocated(ours) == allocated(theirs)
        assert ours.stat().st_size <= theirs.stat().st_size
        assert ours.stat().st_blocks <= theirs.stat().st_blocks + 16
    assert contents(ours, tmp_path) == contents(theirs, tmp_path)


@pytest.mark.parametrize("mode", [m for m in Preallocation if m is not Preallocation.OFF])
@pytest.mark.parametrize(
    "shape",
    ["version 2", "subclusters of 2 KiB", "64 bit reference counts", "data file"],
)
@pytest.mark.parametrize("backing", [False, True])
def test_disk_grows_with_preallocation(
    tmp_path: Path, mode: Preallocation, shape: str, backing: bool
) -> None:
    """With clusters that are free inside the file, which must not show what was in them."""
    image = tmp_path / "disk"
    words = ["-o", SHAPES.get(shape, f"data_file={tmp_path}/disk.data")]
    if backing:
        (tmp_path / "base").write_bytes(os.urandom(3 * MIB))
        words += ["-b", "base", "-F", "raw"]
    create(image, MIB + 512, *words)
    qemu_io(image, "write -P 9 0 1M", "discard 128k 512k")
    expected = contents(image, tmp_path).ljust(SIZE, b"\0")
    resize(image, SIZE, mode=mode)
    assert check(image) == ""
    assert contents(image, tmp_path) == expected
    assert allocated(image) >= SIZE - MIB - 65536
    if mode is not Preallocation.METADATA:
        room = sum(file.stat().st_blocks * 512 for file in tmp_path.glob("disk*"))
        assert room >= SIZE - MIB - 65536
    # What got its place is written there.
    before = image.stat().st_size
    qemu_io(image, "write -P 7 2M 2M")
    assert image.stat().st_size == before


def test_snapshot_keeps_what_the_disk_loses(tmp_path: Path) -> None:
    image = create(tmp_path / "disk", SIZE, "-o", "cluster_size=4k")
    scribble(image, SIZE, 1)
    before = contents(image, tmp_path)
    qemu_img("snapshot", "-c", "then", image)
    qemu_io(image, "write -P 3 1M 2M")
    resize(image, 2 * MIB, 5 * MIB, MIB)
    assert check(image) == ""
    qemu_img("snapshot", "-a", "then", image)
    assert check(image) == ""
    assert contents(image, tmp_path) == before


def test_what_would_lose_something_is_refused(tmp_path: Path) -> None:
    image = create(tmp_path / "disk", SIZE, "-o", "compat=0.10")
    qemu_img("snapshot", "-c", "then", image)

    async def scenario(backend: BlockBackend) -> None:
        for size in (MIB, 2 * SIZE - SIZE % 512):
            with pytest.raises(BlockError, match="v2 image which has snapshots") as caught:
                await backend.truncate(size)
            assert caught.value.errno == errno.ENOTSUP
        with pytest.raises(BlockError, match="multiple of 512"):
            await backend.truncate(1000)
        with pytest.raises(BlockError, match="preallocation for shrinking"):
            await backend.truncate(MIB, Preallocation.FULL)

    with_image(image, scenario)
    assert check(image) == ""


def test_disk_that_is_too_large_stays_as_it_is(tmp_path: Path) -> None:
    image = create(tmp_path / "disk", MIB, "-o", "cluster_size=512")

    async def scenario(backend: BlockBackend) -> None:
        with pytest.raises(
            BlockError, match="Failed to grow the L1 table: File too large"
        ) as caught:
            await backend.truncate(1 << 50)
        assert caught.value.errno == errno.EFBIG
        await backend.pwritev(0, IoVec.of(b"x" * 512))

    with_image(image, scenario)
    assert check(image) == ""


@pytest.mark.parametrize("refcount_bits", [16, 64])
def test_l1_table_may_be_larger_than_what_a_block_of_counts_is_for(
    tmp_path: Path, refcount_bits: int
) -> None:
    words = f"cluster_size=512,refcount_bits={refcount_bits}"
    image = create(tmp_path / "disk", MIB, "-o", words)
    qemu_io(image, "write -P 7 0 1M")
    with_image(image, lambda backend: backend.truncate(4 << 30))
    assert check(image) == ""
    qemu_io(image, f"write -P 8 {(4 << 30) - MIB} 1M")

    async def scenario(backend: BlockBackend) -> None:
        assert await read(backend, 0, MIB) == b"\7" * MIB
        assert await read(backend, (4 << 30) - MIB, MIB) == b"\10" * MIB
        await backend.truncate(20 << 30)
        await backend.pwritev((20 << 30) - 512, IoVec.of(b"x" * 512))
        await backend.truncate(2 << 30)
        assert await read(backend, 0, MIB) == b"\7" * MIB

    with_image(image, scenario)
    assert check(image) == ""


def test_many_changes_in_a_row(tmp_path: Path) -> None:
    """Writes between them, so that clusters are free everywhere."""
    image = create(tmp_path / "disk", MIB, "-o", "cluster_size=1k,refcount_bits=64")
    rnd = random.Random(5)
    model = bytearray(MIB)

    async def scenario(backend: BlockBackend) -> None:
        for _ in range(60):
            size = rnd.randrange(0, 3 * MIB) // 512 * 512
            if rnd.random() < 0.4:
                grows = size > len(model)
                mode = rnd.choice(list(Preallocation)) if grows else Preallocation.OFF
                await backend.truncate(size, mode)
                del model[size:]
                model.extend(bytes(size - len(model)))
            elif model:
                offset = rnd.randrange(0, len(model)) // 512 * 512
                data = rnd.randbytes(1) * min(len(model) - offset, rnd.choice([512, 8192, 200000]))
                data = data[: len(data) // 512 * 512]
                await backend.pwritev(offset, IoVec.of(data))
                model[offset : offset + len(data)] = data
        assert await read(backend, 0, len(model)) == bytes(model)

    with_image(image, scenario, discard="unmap")
    assert check(image) == ""
    assert contents(image, tmp_path) == bytes(model)
