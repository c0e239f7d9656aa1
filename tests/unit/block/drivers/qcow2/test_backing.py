"""What an image says it is backed by changes by one sector's write, whatever is in the header (row B32.6)."""

from __future__ import annotations

import errno
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.block.drivers.qcow2.backing import change_backing
from vhostblk.block.drivers.qcow2.extensions import Extension, ExtensionType
from vhostblk.block.drivers.qcow2.header import Header
from vhostblk.errors import BlockError, ImageError

SECTOR = 512
FEATURES = Extension(ExtensionType.FEATURE_NAMES, b"name" * 12 * 7)
BITMAPS = Extension(ExtensionType.BITMAPS, bytes(24))
UNKNOWN = Extension(0x12345678, b"from the future")


def header(cluster_bits: int = 16, version: int = 3, **fields: Any) -> Header:
    size = 1 << cluster_bits
    made = Header(version, cluster_bits, 1 << 20, 1024, 16 * size, size, 1)
    return replace(made, **fields)


def says(data: bytes) -> tuple[str, str]:
    found = Header.parse(data)
    return found.backing_name, found.backing_format


def apply(data: bytes, offset: int, written: bytes) -> bytes:
    return data[:offset] + written + data[offset + len(written) :]


names = st.text(st.characters(min_codepoint=33, max_codepoint=1000), max_size=340)
formats = st.sampled_from(["", "raw", "qcow2", "host_device"])


@given(
    cluster_bits=st.sampled_from([9, 10, 12, 16]),
    version=st.sampled_from([2, 3]),
    extensions=st.lists(st.sampled_from([FEATURES, BITMAPS, UNKNOWN]), unique_by=lambda e: e.type),
    said=st.lists(st.tuples(names, formats), min_size=2, max_size=4),
    torn=st.sets(st.integers(0, 3)),
)
def test_any_header_says_the_old_or_the_new_whenever_the_power_goes(
    cluster_bits: int,
    version: int,
    extensions: list[Extension],
    said: list[tuple[str, str]],
    torn: set[int],
) -> None:
    now = header(cluster_bits, version, extensions=tuple(extensions))
    try:
        disk = now.to_bytes().ljust(now.cluster_size, b"\0")
    except ImageError:
        return
    for name, driver in said:
        driver = driver if name else ""
        before = says(disk)
        try:
            new, writes = change_backing(now, name, driver)
        except BlockError as error:
            if error.errno == errno.ENOSPC:
                continue
            raise
        assert (writes[-1][0], len(writes[-1][1])) == (0, SECTOR)
        for offset, data in writes:
            if (offset, len(data)) == (0, SECTOR):
                disk = apply(disk, offset, data)
                before = name, driver
                assert says(disk) == before
                continue
            for sector in torn:
                part = data[: (sector + 1) * 100]
                assert says(apply(disk, offset, part)) == before
            disk = apply(disk, offset, data)
            assert says(disk) == before
        assert len(disk) == now.cluster_size
        assert before == (name, driver)
        again = Header.parse(disk)
        assert again == new
        # Whoever writes it again, for another field, changes nothing but what nobody needs any more.
        whole = again.to_bytes()
        for end in (SECTOR, len(whole)):
            assert Header.parse(apply(disk, 0, whole[:end])) == new
        kept = {e for e in again.extensions if e.type != ExtensionType.BACKING_FORMAT}
        assert kept | {FEATURES} == set(extensions) | {FEATURES}
        now = new


def test_names_of_features_stay_where_there_is_room() -> None:
    new, writes = change_backing(header(extensions=(FEATURES,)), "x" * 1023, "qcow2")
    assert FEATURES in new.extensions
    assert len(writes) == 2


def test_names_that_are_too_long_or_have_no_room_are_refused() -> None:
    for name, number in (("x" * 1024, errno.EINVAL), ("a\0b", errno.EINVAL)):
        with pytest.raises(BlockError) as raised:
            change_backing(header(), name, "raw")
        assert raised.value.errno == number
    with pytest.raises(BlockError) as raised:
        change_backing(header(9), "x" * 400, "raw")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(BlockError) as raised:
        change_backing(header(), "x", "a-format-of-sixteen")
    assert raised.value.errno == errno.EINVAL


def test_long_names_of_data_files_leave_the_layout_as_it_is_or_are_refused() -> None:
    data_file = Extension(ExtensionType.DATA_FILE, b"d" * 600)
    old = header(extensions=(data_file,), incompatible=4)
    with pytest.raises(BlockError) as raised:
        change_backing(old, "base", "raw")  # everything behind the format would move
    assert raised.value.errno == errno.ENOSPC
    has_format = Extension(ExtensionType.BACKING_FORMAT, b"raw")
    old = header(extensions=(has_format, data_file), incompatible=4, backing_name="old")
    _, writes = change_backing(old, "new", "qcow2")
    assert [offset for offset, _ in writes] == [writes[0][0], 0]
    raw = header(extensions=(data_file,), incompatible=4, autoclear=2)
    with pytest.raises(BlockError) as raised:
        change_backing(raw, "base", "")
    assert raised.value.errno == errno.EINVAL
