"""What people are told about an image, byte for byte QEMU's; the differential tests compare what images can have."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from vhostblk.block.image_info import ImageInfo
from vhostblk.block.internal_snapshot import SnapshotInfo
from vhostblk.cli.image_info_text import image_info_text, size_text, snapshot_table


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (1023, "0.999 KiB"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (999 << 10, "999 KiB"),
        (1000 << 10, "0.977 MiB"),
        (196 << 10, "196 KiB"),
        (1610612736, "1.5 GiB"),
        (1234567890123, "1.12 TiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.fixture
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("utc")
def test_a_snapshot_that_somebody_counted_instructions_of_has_them_in_the_last_column() -> None:
    one = SnapshotInfo("7", "running", 1234567890, 0, 3725_004_999_999, 99 << 20, icount=12345)
    two = SnapshotInfo("8", "stopped")
    assert list(snapshot_table([one, two])) == [
        "ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT",
        "7         running            99 MiB 2009-02-13 23:31:30 01:02:05.004      12345",
        "8         stopped               0 B 1970-01-01 00:00:00 00:00:00.000           ",
    ]


def test_what_is_not_known_is_named() -> None:
    info = ImageInfo("image", "foo", 512, backing_filename="base", is_dirty=True, is_encrypted=True)
    assert image_info_text(info).splitlines() == [
        *("image: image", "file format: foo", "virtual size: 512 B (512 bytes)"),
        *("disk size: unavailable", "encrypted: yes", "cleanly shut down: no"),
        "backing file: base (cannot determine actual path)",
    ]
