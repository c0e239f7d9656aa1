"""Which errno leads to what: row B39."""

from __future__ import annotations

import errno

import pytest

from vhostblk.export.error_policy import Action, ErrorPolicy, OnError

REPORT, IGNORE, STOP = Action.REPORT, Action.IGNORE, Action.STOP


@pytest.mark.parametrize(
    ("policy", "full", "broken"),
    [
        (OnError.REPORT, REPORT, REPORT),
        (OnError.IGNORE, IGNORE, IGNORE),
        (OnError.ENOSPC, STOP, REPORT),
        (OnError.STOP, STOP, STOP),
    ],
)
def test_policies_of_both_directions_are_independent_and_do_what_qemus_do(
    policy: OnError, full: Action, broken: Action
) -> None:
    for is_read in (True, False):
        mine = ErrorPolicy(rerror=policy) if is_read else ErrorPolicy(werror=policy)
        assert mine.action(errno.ENOSPC, is_read=is_read) is full
        assert mine.action(errno.EIO, is_read=is_read) is broken
        other = mine.action(errno.EIO, is_read=not is_read)
        assert other is REPORT


def test_by_default_reads_are_reported_and_writes_stop_for_want_of_room() -> None:
    policy = ErrorPolicy()
    assert policy.of(is_read=True) is OnError.REPORT
    assert policy.of(is_read=False) is OnError.ENOSPC


@pytest.mark.parametrize("error", [errno.ENOMEDIUM, errno.EFAULT])
def test_what_no_mending_of_the_disk_would_help_is_always_reported(error: int) -> None:
    policy = ErrorPolicy(OnError.STOP, OnError.STOP)
    assert policy.action(error, is_read=True) is REPORT
    assert policy.action(error, is_read=False) is REPORT


@pytest.mark.parametrize(
    ("rerror", "werror", "expected"),
    [
        ("auto", "auto", True),
        ("report", "report", False),
        ("enospc", "report", False),
        ("report", "enospc", True),
        ("ignore", "ignore", False),
        ("stop", "report", True),
        ("report", "stop", True),
    ],
)
def test_there_is_a_status_only_where_something_can_stop(
    rerror: str, werror: str, expected: bool
) -> None:
    assert ErrorPolicy(OnError(rerror), OnError(werror)).has_status is expected
