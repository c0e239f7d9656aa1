"""What is said about each failure, in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest

from vhostblk.client.bench.run import describe_failure
from vhostblk.native.load import LoadError, LoadFailure, LoadOp

ERROR = LoadError(
    failure=LoadFailure.STATUS,
    op=LoadOp.WRITE_ZEROES,
    queue=3,
    length=4096,
    offset=8192,
    found=1,
    expected_generation=0,
    expected_zero=False,
    at=0,
    expected=bytes(512),
    sector=bytes(512),
)


def sector(offset: int, generation: int) -> bytes:
    return offset.to_bytes(8, "little") + generation.to_bytes(8, "little") + b"x" * 496


@pytest.mark.parametrize(
    ("failure", "found", "said"),
    [
        (
            LoadFailure.STATUS,
            1,
            "write zeroes of 4096 bytes at offset 8192 failed: status 1 (IOERR)",
        ),
        (LoadFailure.STATUS, 2, "status 2 (UNSUPP)"),
        (LoadFailure.STATUS, 77, "status 77 (unknown to VIRTIO)"),
        (LoadFailure.NO_STATUS, 255, "at offset 8192 was completed without a status"),
        (LoadFailure.USED_IDX, 40, "queue 3: 40 chains were used, more than were in flight"),
        (LoadFailure.USED_ID, 7, "queue 3: chain 7 was used, which is not in flight"),
    ],
)
def test_failure_is_described(failure: LoadFailure, found: int, said: str) -> None:
    assert said in describe_failure(replace(ERROR, failure=failure, found=found))


@pytest.mark.parametrize(
    ("generation", "zero", "found", "said"),
    [
        (0, True, sector(8192, 1 << 32), "expected zeroes, got other data of that offset"),
        (0, False, bytes(512), "expected what some write with this seed left there, got zeroes"),
        (
            0,
            False,
            sector(4096, 5 << 32),
            "got what belongs to offset 4096, generation 0x500000000",
        ),
        (0, False, b"\xff" * 512, "got something that no benchmark wrote"),
        ((9 << 32) + 2, False, sector(8192, (9 << 32) + 1), "got generation 0x900000001 of it"),
        ((9 << 32) + 2, False, sector(8192, (9 << 32) + 2), "got other data of that offset"),
    ],
)
def test_wrong_data_are_described(generation: int, zero: bool, found: bytes, said: str) -> None:
    error = replace(
        ERROR,
        failure=LoadFailure.MISMATCH,
        expected_generation=generation,
        expected_zero=zero,
        sector=found,
    )
    text = describe_failure(error)
    assert text.startswith("wrong data at offset 8192: ")
    assert said in text
