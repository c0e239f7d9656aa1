"""Headers that change: after any crash there is the old one or the new one."""

from __future__ import annotations

import dataclasses
import random

import pytest

from tests.unit.block.drivers.qcow2.files import HEADER
from vhostblk.block.drivers.qcow2.extensions import Extension
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.block.drivers.qcow2.header_change import ROOM, change, without_room
from vhostblk.errors import ImageError

SECTOR = 512
CLUSTER = 4096


def any_header(rnd: random.Random, version: int) -> Header:
    while True:
        header = dataclasses.replace(
            HEADER,
            version=version,
            cluster_bits=12,
            l1_entries=1 << 10,
            size=rnd.randrange(1 << 20) << 9,
            backing_name="b" * rnd.choice([0, 7, rnd.randrange(1000)]),
            extensions=tuple(
                Extension(0x1000 + number, rnd.randbytes(rnd.choice([0, 8, rnd.randrange(400)])))
                for number in range(rnd.randrange(4))
            ),
        )
        if len(header.to_bytes()) < CLUSTER // 2 - 2 * SECTOR:
            return header


def torn(disk: bytearray, offset: int, data: bytes, rnd: random.Random) -> bytes:
    """Some sectors have been written."""
    after = bytearray(disk)
    for at in range(offset // SECTOR * SECTOR, offset + len(data), SECTOR):
        start, end = max(at, offset), min(at + SECTOR, offset + len(data))
        if rnd.random() < 0.5:
            after[start:end] = data[start - offset : end - offset]
    return bytes(after)


@pytest.mark.parametrize("seed", range(60))
def test_torn_change_leaves_the_old_header_or_the_new_one(seed: int) -> None:
    rnd = random.Random(seed)
    now = any_header(rnd, seed % 2 + 2)
    disk = bytearray(now.to_bytes().ljust(CLUSTER, b"\0"))
    for _ in range(8):
        new = any_header(rnd, now.version)
        after, writes = change(now, new)
        for offset, data in writes:
            for _ in range(6):
                found = without_room(Header.parse(torn(disk, offset, data, rnd)))
                assert found in (without_room(now), new)
            disk[offset : offset + len(data)] = data
        assert Header.parse(bytes(disk)) == after
        assert without_room(after) == new
        # Next time, what is not meant to change stays where it is.
        assert disk[: len(after.to_bytes())] == after.to_bytes()
        now = after


def test_what_moves_goes_behind_and_comes_back() -> None:
    old = dataclasses.replace(HEADER, backing_name="b" * 500)
    new = dataclasses.replace(old, extensions=(Extension(5, b"12345678"),))
    after, writes = change(old, new)
    assert len(writes) == 2
    assert [extension.type for extension in after.extensions] == [ROOM, 5]
    back, writes = change(after, old)
    assert len(writes) == 2
    assert back == old


def test_change_within_a_sector_is_one_write_and_what_does_not_fit_is_refused() -> None:
    new = dataclasses.replace(HEADER, backing_name="base")
    assert change(HEADER, new) == (new, [(0, new.to_bytes())])
    with pytest.raises(ImageError, match="does not fit"):
        change(HEADER, dataclasses.replace(HEADER, extensions=(Extension(5, bytes(70000)),)))
