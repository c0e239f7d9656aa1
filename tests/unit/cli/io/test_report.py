"""What is printed of sizes, times and bytes."""

from __future__ import annotations

import pytest

from vhostblk.cli.io.report import dump, elapsed, human, report


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 bytes"),
        (512, "512 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.500 KiB"),
        (1 << 20, "1 MiB"),
        (1049088, "1 MiB"),
        (3 << 40, "3 TiB"),
        ((1 << 63) - 1, "8 EiB"),
        (460.33903, "460.339030 bytes"),
        (0.00097, "0 bytes"),
    ],
)
def test_size_for_people(value: float, text: str) -> None:
    assert human(value) == text


@pytest.mark.parametrize(
    ("seconds", "short", "long"),
    [
        (0.0, "00.00 sec", "0:00:00.00"),
        (0.9, "00.90 sec", "0:00:00.90"),
        (1.02, "0:00:01.02", "0:00:01.02"),
        (23875.65, "6:37:55.65", "6:37:55.65"),
    ],
)
def test_time(seconds: float, short: str, long: str) -> None:
    assert elapsed(seconds) == short
    assert elapsed(seconds, fixed=True) == long


def test_report_for_people_and_for_machines() -> None:
    assert report("wrote", 7, 512, 0.5, machine=False) == (
        "wrote 512/512 bytes at offset 7\n512 bytes, 1 ops; 00.50 sec (1 KiB/sec and 2.0000 ops/sec)"
    )
    assert report("wrote", 7, 512, 0.5, machine=True) == "512,1,0:00:00.50,1024.000,2.000"
    assert "0 bytes, 1 ops" in report("read", 0, 0, 0.0, machine=False)


def test_dump_has_sixteen_bytes_a_line_and_only_ascii_letters_and_digits() -> None:
    data = memoryview(b"Az09 ~\xe9\x00" + bytes(9))
    assert dump(data, 500) == (
        "000001f4:  41 7a 30 39 20 7e e9 00 00 00 00 00 00 00 00 00  Az09............\n"
        "00000204:  00  ."
    )
