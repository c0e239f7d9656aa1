"""A RAM disk for nbdkit's Python plugin, as short as nbdkit's documentation would have it; `size=BYTES`."""

from __future__ import annotations

from typing import Any

API_VERSION = 2

content = memoryview(bytearray(0))


def config(key: str, value: str) -> None:
    """`size=BYTES` of the command line."""
    global content
    if key != "size":
        raise RuntimeError(f"unknown parameter {key}")
    content = memoryview(bytearray(int(value)))


def open(readonly: bool) -> Any:  # noqa: A001 - nbdkit's names
    """A client has come."""
    return 1


def get_size(handle: Any) -> int:
    """Bytes."""
    return len(content)


def pread(handle: Any, buf: bytearray, offset: int, flags: int) -> None:
    """Fill the buffer."""
    buf[:] = content[offset : offset + len(buf)]


def pwrite(handle: Any, buf: bytes, offset: int, flags: int) -> None:
    """Take what is in the buffer."""
    content[offset : offset + len(buf)] = buf
