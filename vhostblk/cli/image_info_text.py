"""What is known about an image, for people: `qemu-img info`, and parts of it that other commands print, too.

Text only, byte for byte QEMU's. What is known: `block/image_info.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from vhostblk.block.image_info import FormatInfo, ImageInfo
from vhostblk.block.internal_snapshot import SnapshotInfo
from vhostblk.block.qjson import member_order

_PREFIXES = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")
_INDENT = 4
_COLUMNS = ("ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT")


def size_text(size: int) -> str:
    """A number of bytes with three digits: `1.5 GiB`; the next unit begins at 1000 of the one before."""
    _, exponent = math.frexp(size / (1000 / 1024))
    power = max(0, exponent - 1) // 10
    return f"{size / (1 << 10 * power):.3g} {_PREFIXES[power]}B"


def image_info_text(info: ImageInfo) -> str:
    """All lines about an image, each with its end."""
    return "".join(f"{line}\n" for line in _lines(info))


def _lines(info: ImageInfo) -> Iterator[str]:
    actual = "unavailable" if info.actual_size is None else size_text(info.actual_size)
    yield f"image: {info.filename}"
    yield f"file format: {info.format}"
    yield f"virtual size: {size_text(info.virtual_size)} ({info.virtual_size} bytes)"
    yield f"disk size: {actual}"
    if info.is_encrypted:
        yield "encrypted: yes"
    if info.cluster_size is not None:
        yield f"cluster_size: {info.cluster_size}"
    if info.is_dirty:
        yield "cleanly shut down: no"
    if info.backing_filename is not None:
        yield f"backing file: {info.backing_filename}{_actual_path(info)}"
        if info.backing_format is not None:
            yield f"backing file format: {info.backing_format}"
    if info.snapshots:
        yield "Snapshot list:"
        yield from snapshot_table(info.snapshots)
    if info.format_info is not None:
        yield from format_info_lines(info.format_info)


def _actual_path(info: ImageInfo) -> str:
    if info.full_backing_filename is None:
        return " (cannot determine actual path)"
    if info.full_backing_filename == info.backing_filename:
        return ""
    return f" (actual path: {info.full_backing_filename})"


# ---------------------------------------------------------------------- snapshots


def snapshot_table(snapshots: Iterable[SnapshotInfo]) -> Iterator[str]:
    """Lines without their ends: what the columns are, and one for each snapshot."""
    id_, name, *others = _COLUMNS
    yield f"{id_:<10}{name:<17}{_right(*others)}"
    for one in snapshots:
        cells = (
            size_text(one.vm_state_size),
            datetime.fromtimestamp(one.seconds).strftime("%Y-%m-%d %H:%M:%S"),
            _clock(one.vm_clock),
            "" if one.icount is None else str(one.icount),
        )
        yield f"{_left(one.id, 9)} {_left(one.name, 16)} {_right(*cells)}"


def _right(size: str, date: str, clock: str, icount: str) -> str:
    return f"{size:>8}{date:>20}{clock:>13}{icount:>11}"


def _left(text: str, width: int) -> str:
    """Fill up to so many bytes, as C counts."""
    return text + " " * (width - len(text.encode(errors="surrogateescape")))


def _clock(nanoseconds: int) -> str:
    milliseconds = nanoseconds // 10**6
    minutes, seconds = divmod(milliseconds // 1000, 60)
    return f"{minutes // 60:02}:{minutes % 60:02}:{seconds:02}.{milliseconds % 1000:03}"


# ---------------------------------------------------------------------- formats


def format_info_lines(info: FormatInfo) -> Iterator[str]:
    """Lines without their ends: what only the format knows, nested by indentation."""
    yield "Format specific information:"
    yield from _members(info.facts, 1)


def _members(members: Mapping[str, Any], depth: int) -> Iterator[str]:
    for name in member_order(members):
        yield from _entry(f"{name.replace('-', ' ')}:", members[name], depth)


def _entry(title: str, value: Any, depth: int) -> Iterator[str]:
    indent = " " * (_INDENT * depth)
    if isinstance(value, Mapping):
        yield indent + title
        yield from _members(value, depth + 1)
    elif isinstance(value, list | tuple):
        yield indent + title
        for index, item in enumerate(value):
            yield from _entry(f"[{index}]:", item, depth + 1)
    else:
        text = str(value).lower() if isinstance(value, bool) else str(value)
        yield f"{indent}{title} {text}"
