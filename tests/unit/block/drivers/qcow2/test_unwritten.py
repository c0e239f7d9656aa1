"""Whether an image has clusters that were never written: what its counts and the size of its file say of that."""

from __future__ import annotations

import asyncio
import errno
from typing import Any, cast

import pytest

from tests.unit.block.drivers.qcow2.files import HEADER, BytesFile
from vhostblk.block.drivers.qcow2.unwritten import is_sparse
from vhostblk.block.iov import IoVec
from vhostblk.errors import BlockError

CLUSTER = 65536
COUNTS = CLUSTER // 2  # of a block


class SparseFile(BytesFile):
    """With a table of two blocks of counts, and as large as is said.

    Args:
        clusters: its length.
        used: how many of them have a place in the image, from the beginning on.
        room: how many are allocated on the disk; -1: nobody knows.
    """

    def __init__(self, clusters: int, used: int, room: int) -> None:
        table = b"".join(number.to_bytes(8) for number in (2 * CLUSTER, 3 * CLUSTER))
        counts = (b"\0\1" * used).ljust(2 * CLUSTER, b"\0")
        super().__init__(bytes(CLUSTER) + table.ljust(CLUSTER, b"\0") + counts)
        self.length = clusters * CLUSTER
        self.room = room
        self.reads: list[int] = []

    @property
    def node(self) -> Any:
        return cast(Any, self)

    async def driver_allocated_size(self) -> int:
        if self.room < 0:
            raise BlockError(errno.ENOTSUP)
        return self.room * CLUSTER

    async def preadv(self, offset: int, iov: IoVec) -> None:
        self.reads.append(offset // CLUSTER)
        await super().preadv(offset, iov)


@pytest.mark.parametrize(
    ("clusters", "used", "room", "expected", "reads"),
    [
        (1000, 1000, 100, True, [1, 2]),
        (1000, 111, 100, True, [1, 2]),
        (1000, 110, 100, False, [1, 2]),  # as many as metadata of the file system may be
        (1000, 1000, 990, False, []),  # it is full: there is nothing to be counted
        (1000, 500, 500, False, [1, 2]),  # others were given up
        (COUNTS + 600, COUNTS + 600, 29761, True, [1, 2, 3]),
        (COUNTS + 600, 400, 1000, False, [1, 2]),  # what is left is not enough
        (10, 3, 1, True, [1, 2]),
        (10, 2, 1, False, [1, 2]),
        (1000, 1000, -1, False, []),
    ],
)
def test_image_is_sparse_if_far_more_clusters_are_used_than_there_is_room_for(
    clusters: int, used: int, room: int, expected: bool, reads: list[int]
) -> None:
    file = SparseFile(clusters, used, room)
    assert asyncio.run(is_sparse(file.edge, HEADER)) is expected
    assert file.reads == reads
