"""What is found out about a file: alignments asked for, tried, assumed."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from vhostblk.block.drivers import host_file


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(bytes(1 << 16))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def test_page_cached_file_has_no_alignment(fd: int) -> None:
    file = host_file.inspect(fd, direct=False, writable=True)
    assert (file.request_alignment, file.memory_alignment) == (1, 1)
    assert file.size == 1 << 16
    assert not file.is_device
    assert file.sizes.logical == 512


def test_discard_is_not_offered_for_what_cannot_be_written(fd: int) -> None:
    assert not host_file.inspect(fd, direct=False, writable=False).can_discard


def test_memfd_is_known_to_be_in_memory() -> None:
    fd = os.memfd_create("x")
    try:
        assert host_file.inspect(fd, direct=False, writable=True).in_memory
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("asked", "logical", "found"),
    [
        ((4, 512), 0, (512, 512)),
        ((512, 4096), 0, (4096, 4096)),
        ((4096, 512), 0, (512, 4096)),
        ((4, 512), 4096, (4096, 4096)),
    ],
)
def test_kernels_answer_is_made_safe(
    fd: int,
    monkeypatch: pytest.MonkeyPatch,
    asked: tuple[int, int],
    logical: int,
    found: tuple[int, int],
) -> None:
    monkeypatch.setattr(host_file, "_ask_direct_alignment", lambda fd: asked)
    assert host_file._direct_alignment(fd, logical) == found


class Kernel:
    """preadv that insists on an alignment of length and memory."""

    def __init__(self, length: int, memory: int) -> None:
        self.length = length
        self.memory = memory

    def __call__(self, fd: int, buffers: list[Any], offset: int) -> int:
        from vhostblk.block.iov import address_of

        if len(buffers[0]) % self.length or address_of(buffers[0]) % self.memory:
            raise OSError(errno.EINVAL, "no")
        return len(buffers[0])


@pytest.mark.parametrize(
    ("length", "memory", "found"),
    [
        (512, 512, (512, 512)),
        (4096, 512, (4096, 512)),
        (4096, 4096, (4096, 4096)),
        (1024, 2048, (1024, 2048)),
        # Nobody checks, or nothing could be read: play safe.
        (1, 1, (4096, 4096)),
        (1 << 20, 1, (4096, 4096)),
    ],
)
def test_alignment_is_found_by_trying(
    fd: int, monkeypatch: pytest.MonkeyPatch, length: int, memory: int, found: tuple[int, int]
) -> None:
    monkeypatch.setattr(host_file, "_ask_direct_alignment", lambda fd: None)
    monkeypatch.setattr(os, "preadv", Kernel(length, memory))
    assert host_file._try_direct_alignment(fd) == found
    assert host_file._direct_alignment(fd, 0) == (found[0], max(found))


def test_real_o_direct_file_takes_what_was_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 65536)
    try:
        fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"O_DIRECT: {error.strerror}")
    try:
        asked = host_file._direct_alignment(fd, 0)
        tried = host_file._try_direct_alignment(fd)
        assert asked[0] >= 512
        assert tried[0] <= 4096
    finally:
        os.close(fd)
