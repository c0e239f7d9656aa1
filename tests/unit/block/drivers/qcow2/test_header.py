"""The header of a qcow2 image: what is read, what is refused, and that nothing gets lost."""

from __future__ import annotations

import dataclasses
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.unit.block.drivers.qcow2.files import HEADER
from vhostblk.block.drivers.qcow2.extensions import Extension, ExtensionType
from vhostblk.block.drivers.qcow2.header import Compression, Header, Incompatible, cluster_size_of
from vhostblk.errors import ImageError


def changed(**fields: Any) -> bytes:
    return dataclasses.replace(HEADER, **fields).to_bytes()


def refused(data: bytes) -> str:
    with pytest.raises(ImageError) as caught:
        Header.parse(data)
    return str(caught.value)


@pytest.mark.parametrize("version", [2, 3])
def test_what_is_written_is_what_is_read(version: int) -> None:
    extensions = (
        Extension(ExtensionType.BACKING_FORMAT, b"qcow2"),
        Extension(0x12345678, b"nobody knows this"),
    )
    header = dataclasses.replace(
        HEADER, version=version, backing_name="../base.qcow2", extensions=extensions
    )
    assert Header.parse(header.to_bytes()) == header
    assert header.backing_format == "qcow2"


def test_fields_of_the_future_are_kept() -> None:
    header = dataclasses.replace(HEADER, unknown=b"from 2040")
    # The length of a header is a multiple of 8.
    header = dataclasses.replace(header, unknown=header.unknown.ljust(16, b"\0"))
    assert Header.parse(header.to_bytes()).unknown == header.unknown


def test_names_are_bytes() -> None:
    name = b"caf\xe9.qcow2".decode(errors="surrogateescape")
    data = changed(backing_name=name)
    assert b"caf\xe9.qcow2" in data
    assert Header.parse(data).backing_name == name


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"version": 4}, "version 4"),
        ({"cluster_bits": 8}, "cluster size"),
        ({"cluster_bits": 22}, "cluster size"),
        ({"refcount_order": 7}, "64 bits"),
        ({"l1_offset": 0x30200}, "L1 table offset"),
        ({"l1_offset": 0}, "L1 table offset"),
        ({"l1_entries": 1}, "L1 table is too small"),
        ({"size": 1 << 60}, "Image is too big"),
        ({"l1_entries": (32 << 20) // 8 + 1}, "L1 table too large"),
        ({"refcount_table_clusters": 0}, "reference count table"),
        ({"refcount_table_clusters": 129}, "Reference count table too large"),
        ({"refcount_table_offset": 0x10001}, "Reference count table offset"),
        ({"snapshots": 65537}, "Snapshot table too large"),
        ({"snapshots": 1, "snapshots_offset": 7}, "Snapshot table offset"),
        ({"snapshots": 0, "snapshots_offset": 7}, "Snapshot table offset"),
        ({"size": (1 << 63) - 512}, "too large"),
        ({"compression": Compression.ZSTD}, "contradict"),
        ({"incompatible": Incompatible.COMPRESSION}, "contradict"),
        ({"incompatible": Incompatible.COMPRESSION, "compression": 2}, "compression type 2"),
        ({"incompatible": 1 << 5}, "Unknown incompatible feature: 20"),
        ({"cluster_bits": 13, "incompatible": Incompatible.EXTENDED_L2}, "16 KiB"),
        ({"autoclear": 2, "backing_name": "b"}, "backing file"),
        ({"backing_name": "b" * 1024}, "Backing file name too long"),
    ],
)
def test_what_is_wrong_has_a_message(fields: dict[str, object], message: str) -> None:
    assert message in refused(changed(**fields))


def test_feature_name_table_names_what_is_missing() -> None:
    names = struct.pack(">BB46s", 0, 40, b"time travel")
    data = changed(
        incompatible=1 << 40, extensions=(Extension(ExtensionType.FEATURE_NAMES, names),)
    )
    assert refused(data) == "Unsupported qcow2 feature(s): time travel"


def test_unknown_kind_of_encryption_is_refused() -> None:
    data = bytearray(HEADER.to_bytes())
    data[32:36] = (9).to_bytes(4)
    assert refused(bytes(data)) == "Unsupported encryption method 9"


def test_old_kind_of_encryption_is_kept() -> None:
    data = changed(crypt=1)
    assert Header.parse(data).crypt == 1
    assert Header.parse(data).crypt_area == (0, 0)
    assert Header.parse(data).to_bytes() == data


@pytest.mark.parametrize(
    ("crypt", "keys", "complaint"),
    [
        (2, None, "Missing CRYPTO header for crypt method 2"),
        (2, struct.pack(">QQ", 0x10000, 0), "Missing CRYPTO header for crypt method 2"),
        (2, bytes(15), "CRYPTO header extension size 15, but expected size 16"),
        (1, bytes(16), "CRYPTO header extension only expected with LUKS encryption method"),
        (0, bytes(16), "CRYPTO header extension only expected with LUKS encryption method"),
        (
            2,
            struct.pack(">QQ", 0x10200, 4096),
            "Encryption header offset '66048' is not a multiple of cluster size '65536'",
        ),
        (
            2,
            struct.pack(">QQ", 0x10000, 1 << 40),
            f"Encryption header is too large: {1 << 40} bytes",
        ),
        (2, struct.pack(">QQ", 1 << 60, 4096), "Encryption header offset invalid"),
        (2, struct.pack(">QQ", 0, 4096), "Encryption header offset invalid"),
    ],
)
def test_place_of_keys_that_makes_no_sense_is_refused(
    crypt: int, keys: bytes | None, complaint: str
) -> None:
    extensions = () if keys is None else (Extension(ExtensionType.ENCRYPTION, keys),)
    assert refused(changed(crypt=crypt, extensions=extensions)) == complaint


def test_same_extension_twice_is_refused() -> None:
    twice = (Extension(ExtensionType.BITMAPS, bytes(24)),) * 2
    assert "twice" in refused(changed(extensions=twice))


@pytest.mark.parametrize("length", [0, 4, 71, 72, 103])
def test_file_that_ends_too_early_is_refused(length: int) -> None:
    assert refused(HEADER.to_bytes()[:length])


def test_header_that_does_not_fit_into_a_cluster_is_not_written() -> None:
    header = dataclasses.replace(
        HEADER, cluster_bits=9, l1_entries=1 << 15, extensions=(Extension(1, bytes(500)),)
    )
    with pytest.raises(ImageError, match="does not fit"):
        header.to_bytes()


VALID = HEADER.to_bytes() + changed(
    backing_name="base", extensions=(Extension(ExtensionType.BACKING_FORMAT, b"raw"),)
)


@given(st.binary(max_size=200), st.lists(st.tuples(st.integers(0, 199), st.integers(0, 255))))
def test_hostile_bytes_are_a_header_or_an_error(noise: bytes, flips: list[tuple[int, int]]) -> None:
    data = bytearray(VALID)
    for at, value in flips:
        data[at % len(data)] = value
    for hostile in (bytes(data), bytes(data[:100]) + noise, noise):
        assert 0 <= cluster_size_of(hostile) <= 2 << 20
        try:
            header = Header.parse(hostile)
        except ImageError:
            continue
        assert header.l1_entries_needed(header.size) <= header.l1_entries <= 4 << 20


def test_of_two_formats_of_the_backing_file_the_last_one_counts() -> None:
    formats = tuple(Extension(ExtensionType.BACKING_FORMAT, name) for name in (b"raw", b"foo"))
    assert Header.parse(changed(extensions=formats)).backing_format == "foo"
