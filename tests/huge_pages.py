"""Huge pages of 2 MiB for a test: the kernel's pool grows for it, where we may, and is as before afterwards."""

from __future__ import annotations

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

__all__ = ["HUGE_PAGE", "huge_file", "huge_pages"]

HUGE_PAGE = 2 << 20
_POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
_NUMBER = _POOL / "nr_hugepages"
_MFD_HUGE_2MB = 21 << 26


def _read(name: str) -> int:
    return int((_POOL / name).read_text())


def _lacking(count: int) -> str:
    """Make the pool large enough; why it is not."""
    lacking = count - (_read("free_hugepages") - _read("resv_hugepages"))
    if lacking > 0:
        _NUMBER.write_text(str(_read(_NUMBER.name) + lacking))
    free = _read("free_hugepages")
    return "" if free >= count else f"the kernel has {free} of {count} huge pages"


def _shrink_to(number: int) -> None:
    """Pages in use count until they are given back: whoever comes next must not believe that it was so before."""
    deadline = time.monotonic() + 10
    while _read(_NUMBER.name) != number and time.monotonic() < deadline:
        _NUMBER.write_text(str(number))
        os.sched_yield()


@contextmanager
def huge_pages(count: int, *, skip: bool = True) -> Iterator[bool]:
    """So many are free inside; whether that is so. One test at a time.

    Args:
        skip: skip the test if it is not.
    """
    try:
        pool = _NUMBER.open()
    except OSError as exc:
        if skip:
            pytest.skip(f"no huge pages: {exc}")
        yield False
        return
    with pool:
        fcntl.flock(pool, fcntl.LOCK_EX)
        before = _read(_NUMBER.name)
        try:
            reason = _lacking(count)
        except OSError as exc:
            reason = f"no huge pages: {exc}"
        try:
            if reason and skip:
                pytest.skip(reason)
            yield not reason
        finally:
            _shrink_to(before)


def huge_file(size: int) -> int:
    """A file in huge pages; the fd is the caller's."""
    fd = os.memfd_create("huge", os.MFD_CLOEXEC | os.MFD_HUGETLB | _MFD_HUGE_2MB)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd
