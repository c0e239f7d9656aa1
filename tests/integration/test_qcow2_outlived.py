"""A guest that outlives its daemon finds all that was completed in a qcow2 image, flushed or not.

Each test looks at a copy of the file that is made while the image is open: what a daemon that is killed then leaves.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

from tests.qcow2_images import MIB, SHAPES, contents, create, no_worse_than_leaks, with_image
from vhostblk.block.backend import BlockBackend
from vhostblk.block.extent import ExtentFlag
from vhostblk.block.iov import IoVec

SIZE = 4 * MIB
CLUSTER = 65536


def left(image: Path) -> bytes:
    """What the disk would contain if the daemon were killed now; its tables are sound."""
    folder = image.parent / "left"
    folder.mkdir(exist_ok=True)
    copy = Path(shutil.copy(image, folder / "copy"))
    no_worse_than_leaks(copy)
    return contents(copy, folder)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "lazy reference counts"])
def test_what_has_completed_is_found_by_whoever_comes_next(tmp_path: Path, shape: str) -> None:
    image = create(tmp_path / "i", SIZE, "-o", SHAPES[shape])
    chance = random.Random(1)
    disk = bytearray(SIZE)

    async def scenario(backend: BlockBackend) -> None:
        await backend.be_outlived()
        for number in range(8):
            length = chance.choice([512, 4096, 65536, 200 * 1024])
            offset = chance.randrange(SIZE - length) // 512 * 512
            if chance.random() < 0.3:
                await backend.pwrite_zeroes(offset, length)
                disk[offset : offset + length] = bytes(length)
            else:
                data = chance.randbytes(length)
                await backend.pwritev(offset, IoVec.of(data))
                disk[offset : offset + length] = data
            if number in (0, 7):
                assert left(image) == disk

    with_image(image, scenario)


def test_otherwise_what_was_not_flushed_is_gone(tmp_path: Path) -> None:
    """The test above can fail."""
    image = create(tmp_path / "i", SIZE)

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(b"x" * CLUSTER))
        assert left(image) == bytes(SIZE)
        await backend.be_outlived()
        assert left(image)[:CLUSTER] == b"x" * CLUSTER

    with_image(image, scenario)


def test_clusters_that_the_engine_may_write_alone_are_in_the_tables_before(tmp_path: Path) -> None:
    image = create(tmp_path / "i", SIZE)

    async def scenario(backend: BlockBackend) -> None:
        await backend.be_outlived()
        (extent,) = await backend.prepare_writes([(CLUSTER, CLUSTER + 4096)])
        assert extent.flags & ExtentFlag.WRITE
        assert extent.fd is not None
        os.pwrite(extent.fd, b"e" * 512, extent.host_offset)
        assert left(image)[CLUSTER : CLUSTER + 512] == b"e" * 512

    with_image(image, scenario)


def test_cluster_that_only_we_know_of_is_not_given_to_the_engine(tmp_path: Path) -> None:
    image = create(tmp_path / "i", SIZE)

    async def scenario(backend: BlockBackend) -> None:
        await backend.pwritev(0, IoVec.of(b"x" * CLUSTER))
        (extent,) = await backend.extents(0, CLUSTER)
        assert extent.flags & ExtentFlag.WRITE
        backend.node.is_outlived = True  # and nothing was written down yet
        (extent,) = await backend.extents(0, CLUSTER)
        assert not extent.flags & ExtentFlag.WRITE
        await backend.flush()
        (extent,) = await backend.extents(0, CLUSTER)
        assert extent.flags & ExtentFlag.WRITE

    with_image(image, scenario)
