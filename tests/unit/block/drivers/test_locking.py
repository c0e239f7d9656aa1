"""Image locks: bytes, conflicts, changes; against other openings of the same file in this process."""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.locks import locked_bytes
from vhostblk.block.drivers.locking import ImageLock
from vhostblk.block.permissions import Perm
from vhostblk.errors import ConfigError

READ, WRITE, RESIZE = Perm.CONSISTENT_READ, Perm.WRITE, Perm.RESIZE


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[int]]:
    """Four openings of one file; the last is for looking."""
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(512))
    fds = [os.open(path, os.O_RDWR) for _ in range(4)]
    yield fds
    for fd in fds:
        os.close(fd)


def lock(fd: int, required: bool = False) -> ImageLock:
    return ImageLock(fd, "disk.img", required=required)


def take(one: ImageLock, perm: Perm, shared: Perm) -> None:
    one.prepare(perm, shared)
    one.commit(perm, shared)


def test_bytes_are_qemus(files: list[int]) -> None:
    take(lock(files[0]), READ | WRITE, READ | Perm.WRITE_UNCHANGED)
    assert locked_bytes(files[3]) == {100, 101, 201, 203}


def test_retired_permission_is_left_alone(files: list[int]) -> None:
    take(lock(files[0]), Perm.ALL, Perm.NONE)
    assert locked_bytes(files[3]) == {100, 101, 102, 103, 200, 201, 202, 203}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ((WRITE, Perm.ALL), (READ, READ), 'Failed to get shared "write" lock'),
        ((READ, READ), (WRITE, Perm.ALL), 'Failed to get "write" lock'),
        ((READ, READ), (RESIZE, Perm.ALL), 'Failed to get "resize" lock'),
        ((READ, Perm.NONE), (READ, Perm.ALL), 'Failed to get "consistent read" lock'),
        ((WRITE, Perm.ALL), (WRITE, Perm.ALL), None),
        ((READ, READ), (READ, READ), None),
    ],
)
def test_conflict_names_the_permission_and_the_image(
    files: list[int], first: tuple[Perm, Perm], second: tuple[Perm, Perm], message: str | None
) -> None:
    take(lock(files[0]), *first)
    before = locked_bytes(files[3])
    if message is None:
        take(lock(files[1]), *second)
        return
    with pytest.raises(ConfigError) as caught:
        lock(files[1]).prepare(*second)
    assert str(caught.value).startswith(message)
    assert "[disk.img]" in str(caught.value)
    assert locked_bytes(files[3]) == before


def test_change_keeps_the_old_locks_until_it_is_made(files: list[int]) -> None:
    one = lock(files[0])
    take(one, WRITE, Perm.ALL)
    one.prepare(READ, READ)
    assert locked_bytes(files[3]) == {100, 101, 201, 202, 203}
    one.abort()
    assert locked_bytes(files[3]) == {101}
    one.prepare(READ, READ)
    one.commit(READ, READ)
    assert locked_bytes(files[3]) == {100, 201, 202, 203}
    take(one, Perm.NONE, Perm.ALL)
    assert locked_bytes(files[3]) == set()


def test_asking_for_less_never_fails_whatever_others_do(files: list[int]) -> None:
    one = lock(files[0])
    take(one, READ | WRITE, READ)
    # Somebody who takes what is not shared without looking.
    for offset in (101, 200, 201):
        request = struct.pack("@hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, offset, 1, 0)
        fcntl.fcntl(files[1], fcntl.F_OFD_SETLK, request)
    take(one, READ, READ | WRITE)
    take(one, Perm.NONE, Perm.ALL)
    with pytest.raises(ConfigError, match='Failed to get "consistent read" lock'):
        one.prepare(READ, READ)


def test_locks_end_with_the_file(tmp_path: Path, files: list[int]) -> None:
    fd = os.open(tmp_path / "disk.img", os.O_RDONLY)
    take(lock(fd), READ, READ)
    assert locked_bytes(files[3])
    os.close(fd)
    assert not locked_bytes(files[3])


def test_somebody_elses_exclusive_lock_is_named_by_its_byte(files: list[int]) -> None:
    request = struct.pack("@hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 100, 1, 0)
    fcntl.fcntl(files[1], fcntl.F_OFD_SETLK, request)
    with pytest.raises(ConfigError, match=r"Failed to lock byte 100 of 'disk\.img'"):
        lock(files[0]).prepare(READ, Perm.ALL)


@pytest.mark.warns(r"disk\.img: no image locking")
def test_file_system_without_locks_is_a_warning_or_with_locking_on_an_error(
    files: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any) -> bytes:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "fcntl", refuse)
    one = lock(files[0])
    take(one, WRITE, READ)
    take(one, Perm.NONE, Perm.ALL)
    with pytest.raises(ConfigError, match="locking=off goes without"):
        lock(files[1], required=True).prepare(WRITE, READ)
