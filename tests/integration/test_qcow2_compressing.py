"""Compressed writes to qcow2 images: what QEMU reads in them, and how much room they take.

Random ones, among requests of all other kinds, are in test_qcow2_writing.py, and in the tests of crashes and faults.
"""

from __future__ import annotations

import asyncio
import errno
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.qcow2_images import MIB, check, contents, create, qemu_img, qemu_io, read, with_image
from vhostblk.block.backend import BlockBackend
from vhostblk.block.flags import Req, StatusFlag
from vhostblk.block.iov import IoVec
from vhostblk.block.status import block_status
from vhostblk.errors import BlockError

COMPRESSED = int(Req.WRITE_COMPRESSED)
CLUSTER = 65536


def third(rnd: random.Random, length: int) -> bytes:
    """Content that gets to about a third of its length."""
    return b"".join(rnd.randbytes(32).ljust(96, b"\x01") for _ in range(length // 96 + 1))[:length]


def compressed_clusters(image: Path) -> float:
    """How many per cent of those that are allocated, as QEMU counts them."""
    found = re.search(r"([0-9.]+)% compressed clusters", qemu_img("check", image))
    return float(found[1]) if found else 0.0


@pytest.mark.parametrize("kind", ["compression_type=zlib", "compression_type=zstd", "compat=0.10"])
@pytest.mark.parametrize("shape", ["cluster_size=512", "cluster_size=64k", "cluster_size=2M"])
def test_qemu_reads_what_was_compressed_here(tmp_path: Path, kind: str, shape: str) -> None:
    if "zstd" in kind:
        pytest.importorskip("zstandard")
    # The last cluster is not whole.
    size = MIB // 2 if "=512" in shape else 5 * MIB
    content = third(random.Random(1), size + 1536)
    image = create(tmp_path / "i.qcow2", len(content), "-o", f"{kind},{shape}")

    async def scenario(backend: BlockBackend) -> None:
        half = size // 5 * 2 // CLUSTER * CLUSTER if size < MIB else 2 * MIB
        await backend.pwritev(half, IoVec.of(content[half:]), COMPRESSED)
        await backend.pwritev(0, IoVec.of(content[:half]), COMPRESSED)
        assert await read(backend, 0, len(content)) == content

    with_image(image, scenario)
    assert check(image) == ""
    assert compressed_clusters(image) == 100.0
    assert contents(image, tmp_path) == content
    qemu = tmp_path / "qemu.qcow2"
    qemu_img("convert", "-c", "-O", "qcow2", "-o", f"{kind},{shape}", tmp_path / "raw", qemu)
    assert image.stat().st_size < 1.02 * qemu.stat().st_size + 2 * CLUSTER


def test_converted_image_is_the_same_as_qemus_to_the_last_byte(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    rnd = random.Random(5)
    # Some clusters get smaller, some do not, some are zeroes.
    parts = (third(rnd, CLUSTER), rnd.randbytes(CLUSTER), bytes(CLUSTER))
    raw.write_bytes(b"".join(rnd.choice(parts) for _ in range(200)) + rnd.randbytes(512))
    qemu, ours = tmp_path / "qemu.qcow2", tmp_path / "ours.qcow2"
    qemu_img("convert", "-c", "-f", "raw", "-O", "qcow2", raw, qemu)
    command = [sys.executable, "-m", "vhostblk", "img", "convert", "-c", "-f", "raw", "-O", "qcow2"]
    subprocess.run([*command, raw, ours], check=True)
    assert ours.read_bytes() == qemu.read_bytes()


@pytest.mark.parametrize("shape", ["cluster_size=64k", "extended_l2=on", "refcount_bits=1"])
def test_cluster_that_does_not_get_smaller_is_written_plainly(tmp_path: Path, shape: str) -> None:
    rnd = random.Random(2)
    plain, small = rnd.randbytes(CLUSTER), third(rnd, CLUSTER)
    image = create(tmp_path / "i.qcow2", MIB, "-o", shape)

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(small + plain + small), COMPRESSED)
        found = [
            bool((await block_status(backend.node, at, CLUSTER)).flags & StatusFlag.COMPRESSED)
            for at in range(0, 3 * CLUSTER, CLUSTER)
        ]
        assert found == [True, False, True]

    with_image(image, scenario)
    assert check(image) == ""
    assert contents(image, tmp_path) == (small + plain + small).ljust(MIB, b"\0")


def test_compressed_clusters_share_clusters_of_the_file_and_reach_into_the_next_one(
    tmp_path: Path,
) -> None:
    image = create(tmp_path / "i.qcow2", 8 * MIB)
    content = third(random.Random(3), 8 * MIB)

    async def scenario(backend: BlockBackend) -> None:
        before = image.stat().st_size
        await backend.pwritev(0, IoVec.of(content), COMPRESSED)
        await backend.flush()
        # A third of them could not be had with two in each cluster.
        assert image.stat().st_size - before < 0.42 * len(content)

    with_image(image, scenario)
    assert check(image) == ""


def test_room_of_compressed_clusters_is_used_again_once_nobody_is_in_it(tmp_path: Path) -> None:
    size = 2 * MIB
    image = create(tmp_path / "i.qcow2", size)
    rnd = random.Random(4)

    async def scenario(backend: BlockBackend) -> None:
        sizes = []
        for _ in range(6):
            for at in range(0, size, MIB // 4):
                await backend.pwritev(at, IoVec.of(third(rnd, MIB // 4)), COMPRESSED)
            await backend.pdiscard(MIB // 4, MIB // 2)
            await backend.flush()
            sizes.append(image.stat().st_size)
        assert sizes[-1] < 3 * sizes[0]

    with_image(image, scenario, discard="unmap")
    assert check(image) == ""


def test_compressed_writes_and_discards_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    """A cluster of the file that one has left goes back to the host; another must not be put there meanwhile."""
    image = create(tmp_path / "i.qcow2", 4 * MIB, "-o", "cluster_size=4k")
    rnd = random.Random(5)
    content: dict[int, bytes] = {}

    async def scenario(backend: BlockBackend) -> None:
        async def lane(first: int) -> None:
            for _ in range(60):
                at = rnd.randrange(first, 1024, 8) * 4096
                if rnd.random() < 0.4:
                    content[at] = bytes(4096)
                    await backend.pdiscard(at, 4096)
                else:
                    content[at] = third(rnd, 4096)
                    await backend.pwritev(at, IoVec.of(content[at]), COMPRESSED)
                if rnd.random() < 0.2:
                    await backend.flush()

        await asyncio.gather(*(lane(first) for first in range(8)))
        for at, expected in content.items():
            assert await read(backend, at, 4096) == expected

    with_image(image, scenario, discard="unmap")
    assert check(image) == ""
    found = contents(image, tmp_path)
    assert all(found[at : at + 4096] == expected for at, expected in content.items())


def test_snapshot_keeps_what_is_written_anew_compressed(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB)
    old, new = third(random.Random(6), MIB), third(random.Random(7), MIB)

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(old), COMPRESSED)

    async def later(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(new), COMPRESSED)

    with_image(image, scenario)
    qemu_img("snapshot", "-c", "s", image)
    with_image(image, later)
    assert contents(image, tmp_path) == new
    assert check(image) == ""
    qemu_img("snapshot", "-a", "s", image)
    assert contents(image, tmp_path) == old
    assert check(image) == ""


def test_only_whole_clusters_are_compressed_and_none_in_a_data_file(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB + 512)
    external = create(tmp_path / "e.qcow2", MIB, "-o", f"data_file={tmp_path / 'data'}")

    async def error_of(backend: BlockBackend, offset: int, length: int) -> int | None:
        with pytest.raises(BlockError) as caught:
            await backend.pwritev(offset, IoVec.of(b"\x05" * length), COMPRESSED)
        return caught.value.errno

    async def scenario(backend: BlockBackend) -> None:
        assert await error_of(backend, 512, CLUSTER) == errno.EINVAL
        assert await error_of(backend, 0, CLUSTER + 512) == errno.EINVAL
        assert await error_of(backend, MIB, 1024) == errno.EIO  # behind the end
        await backend.pwritev(MIB, IoVec.of(b"\x06" * 512), COMPRESSED)
        await backend.pwritev(0, IoVec.of(b""), COMPRESSED)
        assert await read(backend, 0, MIB + 512) == bytes(MIB) + b"\x06" * 512

    async def with_data_file(backend: BlockBackend) -> None:
        assert await error_of(backend, 0, CLUSTER) == errno.ENOTSUP

    with_image(image, scenario)
    assert check(image) == ""
    with_image(external, with_data_file)


def test_filters_pass_compressed_writes_on_and_zeroes_become_zero_writes(tmp_path: Path) -> None:
    image = create(tmp_path / "i.qcow2", MIB)

    async def scenario(backend: BlockBackend) -> None:
        content = third(random.Random(8), CLUSTER) + bytes(CLUSTER)
        await backend.pwritev(0, IoVec.of(content[:CLUSTER]), COMPRESSED)
        await backend.pwritev(CLUSTER, IoVec.of(content[CLUSTER:]), COMPRESSED)
        assert await read(backend, 0, 2 * CLUSTER) == content
        first, second = [await block_status(backend.node, at, CLUSTER) for at in (0, CLUSTER)]
        assert first.flags & StatusFlag.DATA
        assert second.flags & (StatusFlag.DATA | StatusFlag.ZERO) == StatusFlag.ZERO

    file = {"driver": "file", "filename": str(image)}
    qcow2 = {"driver": "qcow2", "detect-zeroes": "on", "file": file}
    for driver in ("copy-on-read", "blkdebug"):
        key = "image" if driver == "blkdebug" else "file"
        with_image(None, scenario, driver=driver, **{key: qcow2})
    assert compressed_clusters(image) == 100.0
    qemu_io(image, "read -P 0 64k 64k")


def test_raw_images_are_not_compressed(tmp_path: Path) -> None:
    (tmp_path / "r").write_bytes(bytes(MIB))

    async def scenario(backend: BlockBackend) -> None:
        with pytest.raises(BlockError) as caught:
            await backend.pwritev(0, IoVec.of(b"\x05" * CLUSTER), COMPRESSED)
        assert caught.value.errno == errno.ENOTSUP
        assert await read(backend, 0, CLUSTER) == bytes(CLUSTER)

    with_image(tmp_path / "r", scenario, driver="raw")


@pytest.mark.parametrize(
    "command", ["write -c -P 5 0 64k", "write -c -P 5 64k 512", "write -c 1M 512"]
)
def test_vhostblk_io_compresses_as_qemu_io_does(tmp_path: Path, command: str) -> None:
    outcomes = []
    for program in (["qemu-io"], [sys.executable, "-m", "vhostblk", "io"]):
        image = create(tmp_path / f"{program[0][-4:]}.qcow2", MIB)
        done = subprocess.run(
            [*program, "-c", command, image],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert check(image) == ""
        said = (done.returncode, done.stdout.split("\n")[0], done.stderr)
        outcomes.append((*said, compressed_clusters(image), contents(image, tmp_path)))
    assert outcomes[0] == outcomes[1]
