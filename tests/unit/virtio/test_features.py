"""Feature masks against the kernel's headers, and the way they are shown in logs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from vhostblk.virtio.features import Feature, feature_names

HEADERS = [
    Path("/usr/include/linux", name)
    for name in ("virtio_blk.h", "virtio_config.h", "virtio_ring.h")
]


def test_feature_bits_are_the_ones_of_the_kernel_headers() -> None:
    missing = [str(path) for path in HEADERS if not path.exists()]
    if missing:
        pytest.skip(f"kernel headers are not installed: {', '.join(missing)}")
    text = "".join(path.read_text() for path in HEADERS)
    defined = dict(re.findall(r"#define\s+VIRTIO_(?:BLK_F|F|RING_F)_(\w+)\s+(\d+)", text))
    compared = 0
    for feature in Feature:
        name = str(feature.name).partition("_F_")[2]
        if name in defined:
            assert feature == 1 << int(defined[name]), name
            compared += 1
    assert compared >= 17


def test_feature_names_are_short_and_in_bit_order() -> None:
    bits = Feature.VIRTIO_F_VERSION_1 | Feature.VIRTIO_BLK_F_RO | Feature.VIRTIO_F_EVENT_IDX
    assert feature_names(bits) == "RO, EVENT_IDX, VERSION_1"


def test_feature_names_of_unknown_bits_are_their_numbers() -> None:
    assert feature_names(1 << 63 | 1 << 3) == "bit 3, bit 63"


def test_feature_names_of_nothing_is_none() -> None:
    assert feature_names(0) == "none"
