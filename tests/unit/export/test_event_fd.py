"""Eventfds of somebody else's: never waited for, whatever state they are in."""

from __future__ import annotations

import os
import select
from collections.abc import Iterator

import pytest

from vhostblk.export import event_fd

FULL = (2**64 - 2).to_bytes(8, "little")


@pytest.fixture(params=[0, os.EFD_NONBLOCK], ids=["blocking", "nonblocking"])
def fd(request: pytest.FixtureRequest) -> Iterator[int]:
    number = os.eventfd(0, os.EFD_CLOEXEC | request.param)
    yield number
    os.close(number)


def test_clear_takes_a_kick_away_once(fd: int) -> None:
    os.eventfd_write(fd, 3)
    assert event_fd.clear(fd)
    assert not event_fd.clear(fd)


def test_clear_does_not_wait_for_a_kick_that_somebody_else_took(fd: int) -> None:
    assert not event_fd.clear(fd)


def test_signal_adds_one(fd: int) -> None:
    event_fd.signal(fd)
    assert os.eventfd_read(fd) == 1


def test_signal_does_not_wait_for_a_saturated_fd(fd: int) -> None:
    os.write(fd, FULL)
    event_fd.signal(fd)
    assert os.eventfd_read(fd) == 2**64 - 2


def test_flags_that_the_front_end_shares_stay_as_they_are(fd: int) -> None:
    before = os.get_blocking(fd)
    event_fd.signal(fd)
    event_fd.clear(fd)
    assert os.get_blocking(fd) == before


def test_pipes_serve_as_kick_and_call() -> None:
    reader, writer = os.pipe()
    try:
        event_fd.signal(writer)
        assert event_fd.clear(reader)
        assert not event_fd.clear(reader)
    finally:
        os.close(reader)
        os.close(writer)


def test_signal_survives_a_pipe_that_nobody_reads_any_more() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    event_fd.signal(writer)
    os.close(writer)


def test_clear_tells_of_fds_that_are_ready_for_ever() -> None:
    reader, writer = os.pipe()
    os.close(writer)
    poller = select.epoll()
    for fd in (reader, poller.fileno()):
        with pytest.raises(OSError):
            event_fd.clear(fd)
    poller.close()
    os.close(reader)


def test_signal_survives_whatever_cannot_be_written_to() -> None:
    full, read_only = os.open("/dev/full", os.O_WRONLY), os.open("/dev/zero", os.O_RDONLY)
    for fd in (full, read_only):
        event_fd.signal(fd)
        os.close(fd)
