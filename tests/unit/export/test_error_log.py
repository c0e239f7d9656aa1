"""Each kind of failure is logged once and counted."""

from __future__ import annotations

import errno
import logging

import pytest

from vhostblk.export.error_log import ErrorLog

LOG = logging.getLogger("tests.error_log")


def make() -> ErrorLog:
    return ErrorLog(logging.LoggerAdapter(LOG, {}))


def test_a_kind_is_logged_once_with_its_first_place(caplog: pytest.LogCaptureFixture) -> None:
    errors = make()
    for offset in (512, 1024, 1536):
        errors.record_io_error("read", errno.EIO, offset, 512)
    assert len(caplog.records) == 1
    assert "read failed: Input/output error (EIO) at offset 512, 512 bytes" in caplog.text


def test_what_is_no_failure_is_counted_at_its_own_level(caplog: pytest.LogCaptureFixture) -> None:
    errors = make()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            errors.record("the guest changed its mind", level=logging.INFO)
        errors.summarize()
    assert [record.levelno for record in caplog.records] == [logging.INFO] * 2
    assert caplog.text.endswith("the guest changed its mind: 3 times in all\n")


def test_kinds_differ_by_operation_and_errno(caplog: pytest.LogCaptureFixture) -> None:
    errors = make()
    errors.record_io_error("read", errno.EIO, 0, 512)
    errors.record_io_error("write", errno.EIO, 0, 512)
    errors.record_io_error("write", errno.ENOSPC, 0, 512)
    assert len(caplog.records) == 3


def test_the_summary_counts_what_was_repeated_and_starts_anew(
    caplog: pytest.LogCaptureFixture,
) -> None:
    errors = make()
    for _ in range(5):
        errors.record("write failed")
    errors.record("read failed")
    caplog.clear()
    errors.summarize()
    assert [record.getMessage() for record in caplog.records] == ["write failed: 5 times in all"]
    caplog.clear()
    errors.summarize()
    assert not caplog.records
    errors.record("write failed")
    assert len(caplog.records) == 1
