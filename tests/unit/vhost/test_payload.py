"""Payloads: each layout both ways, and what is refused for its syntax."""

from __future__ import annotations

import pytest

from vhostblk.errors import PeerError
from vhostblk.vhost.payload import (
    U64,
    ConfigSpace,
    Empty,
    InflightDescription,
    MemoryRegion,
    MemoryTable,
    Payload,
    Raw,
    SingleRegion,
    VringAddress,
    VringFile,
    VringState,
)

REGION = MemoryRegion(gpa=0x1000, size=0x2000, uva=0x7F00_0000_0000, mmap_offset=0x3000)

SAMPLES: list[tuple[Payload, int]] = [
    (Empty(), 0),
    (U64(2**64 - 1), 8),
    (VringState(3, 256), 8),
    (VringAddress(1, 0, desc=16, used=32, avail=48, log=64), 40),
    (VringFile(7), 8),
    (VringFile(255, has_fd=False), 8),
    (MemoryTable(()), 8),
    (MemoryTable((REGION,) * 8), 8 + 8 * 32),
    (SingleRegion(REGION), 40),
    (ConfigSpace(32, 2, 0, b"\1\2"), 14),
    (ConfigSpace(0, 256, 1, bytes(256)), 268),
    (InflightDescription(2**40, 4096, 64, 32768), 24),
    (InflightDescription(2**40, 4096, 64, 32768, is_padded=False), 20),
    (Raw(b"abc"), 3),
]


@pytest.mark.parametrize(("payload", "size"), SAMPLES)
def test_payload_survives_the_wire_and_has_the_size_of_the_specification(
    payload: Payload, size: int
) -> None:
    data = payload.pack()
    assert len(data) == size
    assert type(payload).unpack(data) == payload


@pytest.mark.parametrize(
    ("payload", "size"), [sample for sample in SAMPLES if not isinstance(sample[0], Raw)]
)
def test_payload_of_one_byte_more_is_refused(payload: Payload, size: int) -> None:
    with pytest.raises(PeerError):
        type(payload).unpack(payload.pack() + b"\0")


@pytest.mark.parametrize(
    ("payload", "size"), [sample for sample in SAMPLES if sample[1] and sample[1] != 3]
)
def test_payload_of_one_byte_less_is_refused(payload: Payload, size: int) -> None:
    with pytest.raises(PeerError):
        type(payload).unpack(payload.pack()[:-1])


def test_fields_lie_where_the_specification_puts_them() -> None:
    data = VringAddress(index=1, flags=2, desc=3, used=4, avail=5, log=6).pack()
    assert [int.from_bytes(data[i : i + 4], "little") for i in (0, 4)] == [1, 2]
    assert [int.from_bytes(data[i : i + 8], "little") for i in (8, 16, 24, 32)] == [3, 4, 5, 6]
    assert SingleRegion(REGION).pack()[8:16] == (0x1000).to_bytes(8, "little")
    assert VringFile(5, has_fd=False).pack() == b"\x05\x01\0\0\0\0\0\0"


def test_vring_file_with_bits_beyond_the_invalid_fd_flag_is_refused() -> None:
    with pytest.raises(PeerError, match="unknown bits"):
        VringFile.unpack((1 << 9).to_bytes(8, "little"))


def test_memory_table_that_says_four_billion_regions_is_refused() -> None:
    data = b"\xff\xff\xff\xff" + bytes(4) + REGION.pack()
    with pytest.raises(PeerError, match="4294967295 regions"):
        MemoryTable.unpack(data)


def test_memory_table_of_fixed_length_keeps_only_the_regions_it_counts() -> None:
    data = b"\2\0\0\0" + bytes(4) + REGION.pack() * 8
    assert MemoryTable.unpack(data) == MemoryTable((REGION, REGION))


def test_memory_table_of_nine_regions_is_refused() -> None:
    with pytest.raises(PeerError):
        MemoryTable.unpack(MemoryTable((REGION,) * 9).pack())


@pytest.mark.parametrize("size", [0, 257, 2**32 - 1])
def test_config_space_of_impossible_size_is_refused(size: int) -> None:
    with pytest.raises(PeerError, match="bytes of configuration space"):
        ConfigSpace.unpack(ConfigSpace(0, size, 0, b"").pack())


def test_config_space_that_says_another_size_than_it_has_is_refused() -> None:
    with pytest.raises(PeerError, match="instead of 4"):
        ConfigSpace.unpack(ConfigSpace(0, 4, 0, b"12345").pack())


def test_config_space_may_be_asked_for_without_a_buffer() -> None:
    assert ConfigSpace.unpack(ConfigSpace(8, 4, 0, b"").pack()).size == 4
