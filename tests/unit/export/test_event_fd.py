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


@pytest.fixture
def notifier() -> Iterator[event_fd.Notifier]:
    one = event_fd.Notifier()
    yield one
    one.close()
    one.close()


def test_clear_takes_a_kick_away_once(fd: int) -> None:
    os.eventfd_write(fd, 3)
    assert event_fd.clear(fd)
    assert not event_fd.clear(fd)


def test_clear_does_not_wait_for_a_kick_that_somebody_else_took(fd: int) -> None:
    assert not event_fd.clear(fd)


def test_every_signal_adds_one(fd: int, notifier: event_fd.Notifier) -> None:
    for _ in range(100):  # more than the kernel keeps the results of
        notifier.signal(fd)
    assert os.eventfd_read(fd) == 100


def test_signal_does_not_wait_for_a_saturated_fd(fd: int, notifier: event_fd.Notifier) -> None:
    os.write(fd, FULL)
    notifier.signal(fd)
    assert os.eventfd_read(fd) == 2**64 - 2


def test_signal_does_not_wait_for_an_fd_that_is_filled_after_it_was_looked_at(
    fd: int, notifier: event_fd.Notifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if it was made blocking just then: both are the front-end's to do."""
    real = event_fd._ready

    def fill(number: int, event: int) -> bool:
        answer = real(number, event)
        os.set_blocking(number, True)
        os.write(number, FULL)
        return answer

    monkeypatch.setattr(event_fd, "_ready", fill)
    notifier.signal(fd)
    assert os.eventfd_read(fd) >= 2**64 - 2


def test_kernel_that_does_not_signal_is_done_without(
    fd: int, notifier: event_fd.Notifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_fd, "_CALLS", None)
    notifier.signal(fd)
    assert os.eventfd_read(fd) == 1


def test_flags_that_the_front_end_shares_stay_as_they_are(
    fd: int, notifier: event_fd.Notifier
) -> None:
    before = os.get_blocking(fd)
    notifier.signal(fd)
    event_fd.clear(fd)
    assert os.get_blocking(fd) == before


def test_pipes_serve_as_kick_and_call_if_nobody_can_wait_for_them(
    notifier: event_fd.Notifier,
) -> None:
    for flags, serves in ((os.O_NONBLOCK, True), (0, False)):
        reader, writer = os.pipe2(flags)
        try:
            notifier.signal(writer)
            os.set_blocking(reader, False)
            if serves:
                assert event_fd.clear(reader)
            assert not event_fd.clear(reader)
        finally:
            os.close(reader)
            os.close(writer)


def test_signal_survives_a_pipe_that_nobody_reads_any_more(notifier: event_fd.Notifier) -> None:
    reader, writer = os.pipe2(os.O_NONBLOCK)
    os.close(reader)
    notifier.signal(writer)
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


def test_signal_survives_whatever_cannot_be_written_to(notifier: event_fd.Notifier) -> None:
    full = os.open("/dev/full", os.O_WRONLY | os.O_NONBLOCK)
    read_only = os.open("/dev/zero", os.O_RDONLY | os.O_NONBLOCK)
    for fd in (full, read_only):
        notifier.signal(fd)
        os.close(fd)
