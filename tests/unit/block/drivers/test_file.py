"""The file driver: what can be opened, and what is said about the rest."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.block.drivers.disks import read, with_file
from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers.file import FileNode
from vhostblk.block.graph import BlockGraph
from vhostblk.errors import ConfigError


def refused(options: str | dict[str, Any]) -> str:
    """The one line that opening this fails with."""

    async def everything() -> str:
        graph = BlockGraph()
        with pytest.raises(ConfigError) as caught:
            await graph.add(options)
        await graph.close_all()
        return str(caught.value)

    message = asyncio.run(everything())
    assert "\n" not in message
    return message


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(b"i" * 65536)
    return path


def test_what_cannot_be_opened_is_named_with_the_reason(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, reason in (
        (tmp_path / "none", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / "none" / "x", "No such file or directory"),
        (fifo, "neither a regular file nor a block device"),
        (Path("/dev/null"), "neither a regular file nor a block device"),
    ):
        message = refused({"driver": "file", "filename": str(path)})
        assert message == f"Could not open '{path}': {reason}"


def test_host_device_wants_a_block_device(image: Path) -> None:
    message = refused({"driver": "host_device", "filename": str(image)})
    wanted = "to be either a character or block device"
    assert message == f"'host_device' driver requires '{image}' {wanted}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("aio=native", "'aio' does not accept value 'native' (allowed: threads, io_uring)"),
        ("locking=maybe", "'locking' does not accept value 'maybe' (allowed: auto, on, off)"),
        ("pr-manager=x", "'file' (node 'd') does not support the option 'pr-manager'"),
        ("cache.direct=maybe", "Parameter 'cache.direct' expects 'on' or 'off'"),
        ("discard=maybe", "'discard' does not accept value 'maybe'"),
    ],
)
def test_wrong_options_are_named(image: Path, options: str, message: str) -> None:
    assert message in refused(f"file,node-name=d,filename={image},{options}")


def open_failing(monkeypatch: pytest.MonkeyPatch, error: int, when: int) -> None:
    """Make os.open fail for images when all bits of `when` are in its flags (2: O_RDWR)."""
    real = os.open

    def fake(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).endswith(".img") and flags & when:
            raise OSError(error, os.strerror(error))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", fake)


@pytest.mark.parametrize("error", [errno.EACCES, errno.EPERM, errno.EROFS])
def test_auto_read_only_falls_back_where_writing_is_refused(
    image: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    open_failing(monkeypatch, error, os.O_RDWR)
    assert "read-only=on" in refused({"driver": "file", "filename": str(image)})

    async def scenario(backend: BlockBackend, node: FileNode) -> None:
        assert node.read_only
        assert await read(backend, 0, 4) == b"iiii"

    with_file(image, scenario, **{"auto-read-only": "on"})


def test_auto_read_only_does_not_hide_other_errors(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_failing(monkeypatch, errno.EMFILE, os.O_RDWR)
    options = {"driver": "file", "filename": str(image), "auto-read-only": "on"}
    assert "Too many open files" in refused(options)


def test_file_system_without_o_direct_is_said_so(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    open_failing(monkeypatch, errno.EINVAL, os.O_DIRECT)
    message = refused({"driver": "file", "filename": str(image), "cache.direct": "on"})
    assert "may not support O_DIRECT" in message
