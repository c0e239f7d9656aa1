"""Bitmaps in a qcow2 image: what is read, what is refused, and that nothing gets lost."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.block.drivers.qcow2.files import HEADER, BytesFile
from vhostblk.block.drivers.qcow2.bitmaps import (
    ALL_ONES,
    BitmapDirectory,
    BitmapEntry,
    BitmapFlag,
    bytes_needed,
    load_directory,
    load_table,
)
from vhostblk.block.drivers.qcow2.extensions import Extension, ExtensionType
from vhostblk.block.drivers.qcow2.header import AutoClear
from vhostblk.errors import ImageError

PLACE = 0x10000

entries = st.builds(
    BitmapEntry,
    name=st.text(min_size=1, max_size=100),
    granularity=st.integers(9, 31).map(lambda bits: 1 << bits),
    table_offset=st.integers(1, 1000).map(lambda cluster: cluster << 16),
    table_entries=st.integers(4, 8192),
    flags=st.sampled_from([BitmapFlag(bits) for bits in range(8)]),
    extra=st.binary(max_size=100),
)


def load(data: bytes, extension: Extension | None) -> BitmapDirectory:
    header = dataclasses.replace(
        HEADER,
        size=1 << 29,
        extensions=(extension,) if extension else (),
        autoclear=AutoClear.BITMAPS,
    )
    return asyncio.run(load_directory(BytesFile(bytes(PLACE) + data).edge, header))


def directory(*bitmaps: BitmapEntry) -> BitmapDirectory:
    made = BitmapDirectory(PLACE, 0, bitmaps)
    return dataclasses.replace(made, length=len(made.to_bytes()))


def refused(data: bytes, extension: Extension) -> str:
    with pytest.raises(ImageError) as caught:
        load(data, extension)
    return str(caught.value)


@given(bitmaps=st.lists(entries, min_size=1, max_size=6, unique_by=lambda bitmap: bitmap.name))
def test_what_is_written_is_what_is_read(bitmaps: list[BitmapEntry]) -> None:
    made = directory(*bitmaps)
    assert load(made.to_bytes() + b"\xff" * 20, made.extension()) == made
    tables = [(bitmap.table_offset, bitmap.table_entries * 8) for bitmap in bitmaps]
    assert made.places() == [(PLACE, made.length), *tables]


BITMAP = BitmapEntry("monday", 65536, 0x60000, 1, BitmapFlag.AUTO, b"more")


def test_each_field_is_where_the_specification_has_it() -> None:
    data = BITMAP.to_bytes()
    assert struct.unpack_from(">QIIBBHI", data) == (0x60000, 1, 2, 1, 16, 6, 4)
    assert data[24:] == b"moremonday".ljust(16, b"\0")
    made = directory(BITMAP)
    assert struct.unpack(">IIQQ", made.extension().data) == (1, 0, len(data), PLACE)


def test_directory_that_the_feature_bit_does_not_vouch_for_is_not_read() -> None:
    header = dataclasses.replace(HEADER, extensions=(directory(BITMAP).extension(),))
    found = asyncio.run(load_directory(BytesFile().edge, header))
    assert found == BitmapDirectory()
    assert found.places() == []
    assert load(b"", None) == BitmapDirectory()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"name": ""}, "a name of 0 bytes"),
        ({"name": "n" * 1024}, "a name of 1024 bytes"),
        ({"granularity": 256}, "granularity 2^8"),
        ({"granularity": 1 << 32}, "granularity 2^32"),
        ({"table_offset": 0}, "table offset 0x0"),
        ({"table_offset": 0x60200}, "table offset 0x60200"),
        ({"table_offset": 1 << 56}, "table offset"),
        ({"table_entries": 0}, "a table of 0 entries"),
        ({"table_entries": 8193}, "a table of 8193 entries"),
        ({"granularity": 512}, "too small for the disk"),
        ({"flags": 8}, "reserved flags"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], why: str) -> None:
    made = directory(dataclasses.replace(BITMAP, **change))
    assert why in refused(made.to_bytes(), made.extension())


def test_bitmap_that_was_not_stored_may_be_of_a_disk_of_another_size() -> None:
    made = directory(dataclasses.replace(BITMAP, granularity=512, flags=BitmapFlag.IN_USE))
    assert load(made.to_bytes(), made.extension()) == made


@pytest.mark.parametrize(
    ("fields", "why"),
    [
        ((1, 1, 40, PLACE), "Reserved field"),
        ((0, 0, 40, PLACE), "number of bitmaps"),
        ((65536, 0, 40, PLACE), "number of bitmaps"),
        ((1, 0, 0, PLACE), "size of the bitmap directory"),
        ((1, 0, (64 << 20) + 1, PLACE), "size of the bitmap directory"),
        ((1, 0, 40, 0), "directory offset"),
        ((1, 0, 40, PLACE + 512), "directory offset"),
        ((1, 0, 40, 1 << 57), "directory offset"),
        ((2, 0, 40, PLACE), "has 1 bitmaps, not 2"),
        ((2, 0, 80, PLACE), "same name"),
        ((1, 0, 32, PLACE), "ends within an entry"),
        ((1, 0, 48, PLACE), "ends within an entry"),
    ],
)
def test_extension_that_makes_no_sense_is_refused(fields: tuple[int, ...], why: str) -> None:
    extension = Extension(ExtensionType.BITMAPS, struct.pack(">IIQQ", *fields))
    assert why in refused(BITMAP.to_bytes() * 2, extension)
    assert "length" in refused(b"", Extension(ExtensionType.BITMAPS, extension.data + b"\0"))


@given(seed=st.integers(0, 1 << 32))
def test_random_bytes_are_bitmaps_or_refused(seed: int) -> None:
    rnd = random.Random(seed)
    made = directory(BITMAP, dataclasses.replace(BITMAP, name="tuesday"))
    data = bytearray(made.to_bytes())
    for _ in range(rnd.randrange(1, 6)):
        data[rnd.randrange(len(data))] = rnd.randrange(256)
    try:
        found = load(bytes(data), made.extension())
    except ImageError:
        return
    assert len(found.bitmaps) == 2


def test_table_has_places_zeroes_and_ones_and_nothing_else() -> None:
    def table(*entries: int) -> list[int]:
        bitmap = dataclasses.replace(BITMAP, table_offset=0, table_entries=len(entries))
        file = BytesFile(b"".join(entry.to_bytes(8) for entry in entries))
        return list(asyncio.run(load_table(file.edge, HEADER, bitmap)))

    assert table(0, ALL_ONES, 0x70000) == [0, 1, 0x70000]
    for wrong in (2, 0x70001, 0x70200, 1 << 56, 1 << 63):
        with pytest.raises(ImageError, match="is wrong"):
            table(0, wrong)


@given(length=st.integers(0, 1 << 40), bits=st.integers(9, 31))
def test_every_granule_has_a_bit(length: int, bits: int) -> None:
    granules = (length + (1 << bits) - 1) // (1 << bits)
    assert bytes_needed(length, 1 << bits) == (granules + 7) // 8
