"""How a daemon's start, end and words are judged; the daemons here are a few lines of Python."""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path

import pytest

from vhostblk.testing.daemon_process import DaemonError, DaemonProcess, is_listening

LISTENER = """
import signal, socket, sys
signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(int(sys.argv[2])))
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
print("bound", flush=True)
listener.listen()
signal.pause()
"""


def listener(path: Path, status: int = 0) -> DaemonProcess:
    command = [sys.executable, "-c", LISTENER, str(path), str(status)]
    return DaemonProcess(command, sockets=[path])


def test_daemon_is_ready_when_it_listens_and_stops_on_sigterm(socket_directory: Path) -> None:
    path = socket_directory / "s"
    with listener(path) as process:
        assert is_listening(path)
        assert process.status is None
        assert process.stop() == 0
        assert process.output == "bound\n"


def test_socket_that_is_only_bound_is_not_listening(socket_directory: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(socket_directory / "s"))
        assert not is_listening(socket_directory / "s")
        bound.listen()
        assert is_listening(socket_directory / "s")


def test_bad_status_after_sigterm_is_an_error(socket_directory: Path) -> None:
    process = listener(socket_directory / "s", status=3)
    process.start()
    with pytest.raises(DaemonError, match="ended with status 3"):
        process.close()
    process.close()


def test_end_before_listening_is_an_error_that_shows_what_was_said() -> None:
    process = DaemonProcess(
        [sys.executable, "-c", "import sys; sys.exit('wrong option')"], sockets=["/nowhere"]
    )
    with pytest.raises(DaemonError, match=r"status 1\n  \| wrong option"):
        process.start()


def test_daemon_that_never_listens_is_ended_at_the_deadline() -> None:
    process = DaemonProcess(["sleep", "60"], sockets=["/nowhere"])
    with pytest.raises(DaemonError, match="does not listen on /nowhere"):
        process.start(timeout=0.05)


def test_traceback_is_an_error_although_the_status_is_0() -> None:
    code = "import traceback, sys\ntry: 1/0\nexcept Exception: traceback.print_exc()"
    process = DaemonProcess([sys.executable, "-c", code])
    process.start()
    process.wait()
    with pytest.raises(DaemonError, match="showed a traceback"):
        process.close()


def test_end_that_is_expected_returns_what_was_said() -> None:
    process = DaemonProcess([sys.executable, "-c", "import sys; sys.exit('no such file')"])
    process.start()
    assert process.expect_end(1) == "no such file\n"


def test_kill_is_not_held_against_the_daemon(socket_directory: Path) -> None:
    with listener(socket_directory / "s") as process:
        process.kill()
        assert process.status == -signal.SIGKILL


def test_failure_inside_the_with_statement_comes_first(socket_directory: Path) -> None:
    with pytest.raises(ZeroDivisionError), listener(socket_directory / "s", status=3):
        raise ZeroDivisionError


def test_descriptors_are_inherited_under_their_numbers() -> None:
    ours, theirs = socket.socketpair()
    code = f"import os; os.write({theirs.fileno()}, b'here')"
    with ours, theirs:
        process = DaemonProcess([sys.executable, "-c", code], pass_fds=[theirs.fileno()])
        process.start()
        assert process.expect_end(0) == ""
        assert ours.recv(10) == b"here"
