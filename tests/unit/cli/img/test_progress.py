"""What `-p` shows, and when."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator

import pytest

from vhostblk.cli.img.progress import Progress


@pytest.fixture(autouse=True)
def _same_handler_afterwards() -> Iterator[None]:
    before = signal.getsignal(signal.SIGUSR1)
    yield
    signal.signal(signal.SIGUSR1, before)


def lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    shown = capsys.readouterr()
    assert not shown.err
    return shown.out.split("\r")


def test_steps_are_shown_and_the_ends_always(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True, step=2.0) as progress:
        for done in (1, 2, 3, 4, 99, 100, 100):
            progress.report(done, 100)
    assert lines(capsys) == [
        *("    (0.00/100%)", "    (3.00/100%)", "    (99.00/100%)"),
        *("    (100.00/100%)", "    (100.00/100%)", "\n"),
    ]


def test_what_goes_back_or_beyond_is_shown_too(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True) as progress:
        progress.update(0.5)
        progress.update(0.25)
        progress.update(1.5)
    shown = ["    (0.00/100%)", "    (50.00/100%)", "    (25.00/100%)", "    (100.00/100%)", "\n"]
    assert lines(capsys) == shown


def test_line_is_left_when_the_work_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="it failed"), Progress(True):
        raise ValueError("it failed")
    assert lines(capsys) == ["    (0.00/100%)", "\n"]


def test_nothing_of_nothing_is_no_progress(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(True) as progress:
        progress.report(0, 0)
    assert lines(capsys) == ["    (0.00/100%)", "\n"]


def test_signal_asks_once_where_nothing_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    async def scenario() -> None:
        with Progress(False) as progress:
            progress.report(1, 8)
            os.kill(os.getpid(), signal.SIGUSR1)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            progress.report(8, 8)
        # Afterwards nobody has to know any more, and it does no harm.
        os.kill(os.getpid(), signal.SIGUSR1)

    asyncio.run(scenario())
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "    (12.50/100%)\n")
