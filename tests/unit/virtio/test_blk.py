"""The configuration space against the kernel's header and the specification's offsets."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.errors import GuestError
from vhostblk.virtio.blk import CONFIG_SIZE, HEADER, SEGMENT, BlkConfig, RequestType, Status

HEADER_FILE = Path("/usr/include/linux/virtio_blk.h")

# VIRTIO 1.2 §5.2.4, zoned fields from VIRTIO 1.3: field, offset, bytes.
LAYOUT = {
    "capacity": (0, 8),
    "size_max": (8, 4),
    "seg_max": (12, 4),
    "cylinders": (16, 2),
    "heads": (18, 1),
    "sectors": (19, 1),
    "blk_size": (20, 4),
    "physical_block_exp": (24, 1),
    "alignment_offset": (25, 1),
    "min_io_size": (26, 2),
    "opt_io_size": (28, 4),
    "writeback": (32, 1),
    "num_queues": (34, 2),
    "max_discard_sectors": (36, 4),
    "max_discard_seg": (40, 4),
    "discard_sector_alignment": (44, 4),
    "max_write_zeroes_sectors": (48, 4),
    "max_write_zeroes_seg": (52, 4),
    "write_zeroes_may_unmap": (56, 1),
    "max_secure_erase_sectors": (60, 4),
    "max_secure_erase_seg": (64, 4),
    "secure_erase_sector_alignment": (68, 4),
    "zone_sectors": (72, 4),
    "max_open_zones": (76, 4),
    "max_active_zones": (80, 4),
    "max_append_sectors": (84, 4),
    "write_granularity": (88, 4),
    "zone_model": (92, 1),
}


def test_layout_table_names_every_field() -> None:
    assert [field.name for field in dataclasses.fields(BlkConfig)] == list(LAYOUT)
    assert CONFIG_SIZE == 96


@pytest.mark.parametrize("name", LAYOUT)
def test_field_is_at_its_offset_with_its_width_and_nowhere_else(name: str) -> None:
    offset, width = LAYOUT[name]
    value = (1 << 8 * width) - 2
    config = dataclasses.replace(BlkConfig(), **{name: value})
    expected = bytearray(CONFIG_SIZE)
    expected[offset : offset + width] = value.to_bytes(width, "little")
    assert config.to_bytes() == expected
    assert BlkConfig.from_bytes(bytes(expected)) == config


def test_layout_is_the_one_of_the_kernel_header() -> None:
    if not HEADER_FILE.exists():
        pytest.skip(f"{HEADER_FILE} is not installed")
    text = re.sub(r"/\*.*?\*/", "", HEADER_FILE.read_text(), flags=re.DOTALL)
    match = re.search(r"struct virtio_blk_config \{(.*?)\n\}", text, re.DOTALL)
    assert match is not None
    offset, offsets = 0, {}
    # The struct is packed, so offsets are sums; nested structs do not change that.
    for bits, name, count in re.findall(r"__(?:virtio|u|le)(\d+)\s+(\w+)(?:\[(\d+)\])?;", match[1]):
        offsets["writeback" if name == "wce" else name] = (offset, int(bits) // 8)
        offset += int(bits) // 8 * int(count or 1)
    common = offsets.keys() & LAYOUT.keys()
    assert len(common) >= 19
    assert {name: offsets[name] for name in common} == {name: LAYOUT[name] for name in common}


def test_request_structures_have_the_sizes_of_the_specification() -> None:
    assert (HEADER.size, SEGMENT.size) == (16, 16)
    assert [int(kind) for kind in RequestType] == [0, 1, 4, 8, 10, 11, 13, 14]
    assert [int(status) for status in Status] == [0, 1, 2]


SAMPLE = BlkConfig(capacity=0x1122334455667788, blk_size=512, writeback=1, num_queues=64)


@given(st.integers(0, 300), st.integers(0, 300))
def test_read_serves_any_offset_and_length_and_pads_with_zeroes(offset: int, length: int) -> None:
    everything = SAMPLE.to_bytes() + bytes(600)
    assert SAMPLE.read(offset, length) == everything[offset : offset + length]


def test_shorter_space_of_an_older_device_reads_as_zeroes_behind_its_end() -> None:
    assert BlkConfig.from_bytes(SAMPLE.to_bytes()[:32]) == dataclasses.replace(
        SAMPLE, writeback=0, num_queues=0
    )


@pytest.mark.parametrize("value", [0, 1])
def test_writeback_can_be_written(value: int) -> None:
    assert SAMPLE.write(32, bytes([value])) == dataclasses.replace(SAMPLE, writeback=value)


def test_whole_space_can_be_written_back_with_only_writeback_changed() -> None:
    changed = dataclasses.replace(SAMPLE, writeback=0)
    assert SAMPLE.write(0, changed.to_bytes()) == changed


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"\1"),
        (31, b"\1\0"),
        (32, b"\2"),
        (33, b"\1"),
        (95, b"\0\0"),
        (96, b"\0"),
        (-1, b"\0"),
        (2**32, b"\0"),
    ],
)
def test_write_of_anything_but_a_cache_mode_is_refused(offset: int, data: bytes) -> None:
    with pytest.raises(GuestError):
        SAMPLE.write(offset, data)
