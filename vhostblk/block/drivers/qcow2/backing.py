"""What a qcow2 image says it is backed by, and how that changes (row B32.6; qcow2 specification, "Header").

Theory of operation: fields and extensions of a header are in its first sector, but for names of features and of data
files that are long; the name of the backing file may be anywhere behind them in the first cluster. So a new name is
written where nothing is yet, that becomes durable, and then the first sector is written, which refers to it and has the
format. A crash leaves the old name, or the new. Names of features are for messages only: where they are in the way they
go, and come back behind everything else, as one more such change.

Headers in, writes out. Knows nothing about files.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from dataclasses import replace

from vhostblk.block.drivers.qcow2.extensions import Extension, ExtensionType
from vhostblk.block.drivers.qcow2.header import MAX_BACKING_NAME, Header
from vhostblk.block.drivers.qcow2.metadata import HeaderChange
from vhostblk.block.limits import SECTOR_SIZE, align_up
from vhostblk.errors import BlockError, ImageError

# Of those who read images.
_MAX_FORMAT = 15


def change_backing(header: Header, name: str, driver: str) -> HeaderChange:
    """The header that says so, and how to write it.

    Args:
        header: as it is on the disk.
        name: empty: there is no backing file any more.
        driver: empty: nobody says.

    Raises:
        BlockError: EINVAL: no such name can be written; ENOSPC: there is no room for it.
    """
    encoded = name.encode(errors="surrogateescape")
    if len(encoded) > MAX_BACKING_NAME or b"\0" in encoded:
        raise BlockError(errno.EINVAL, "Backing file name too long")
    if len(driver.encode()) > _MAX_FORMAT:
        raise BlockError(errno.EINVAL, f"Backing format '{driver}' is too long")
    return rewritten(
        header,
        (
            replace(header, backing_name=name, extensions=extensions, backing_offset=0)
            for extensions in _extensions(header, driver)
        ),
    )


def rewritten(header: Header, candidates: Iterable[Header]) -> HeaderChange:
    """The first of these headers that can be written, and how.

    Args:
        header: as it is on the disk.
        candidates: with no place for the name of the backing file yet.

    Raises:
        BlockError: EINVAL: no such header can be; ENOSPC: there is no room for its names.
    """
    wanted: Header | None = None
    for bare in candidates:
        wanted = wanted or bare
        for place in _places(header, bare, len(bare.encoded_backing_name)):
            new = replace(bare, backing_offset=place)
            try:
                new.check()
            except ImageError as error:
                raise BlockError(errno.EINVAL, str(error)) from None
            writes = _writes(header, new)
            if writes is not None:
                return (new, writes) if wanted is bare else _completed(new, wanted, writes)
    raise BlockError(errno.ENOSPC, "No space left in the file header for the backing file's name")


def _completed(there: Header, wanted: Header, writes: list[tuple[int, bytes]]) -> HeaderChange:
    """From one header to another that says more of the same, if there is room for it behind the first sector."""
    new = replace(wanted, backing_offset=wanted.extensions_end if wanted.backing_name else 0)
    try:
        new.check()
        data = new.to_bytes()
    except ImageError:
        return there, writes
    behind = there.extensions_end, there.backing_start + len(there.encoded_backing_name)
    if max(behind) > SECTOR_SIZE or not SECTOR_SIZE < len(data) <= new.cluster_size:
        return there, writes
    return new, [*writes, (SECTOR_SIZE, data[SECTOR_SIZE:]), (0, data[:SECTOR_SIZE])]


def _extensions(header: Header, driver: str) -> Iterator[tuple[Extension, ...]]:
    """Ways to say the format, the one that changes least first."""
    says = Extension(ExtensionType.BACKING_FORMAT, driver.encode())
    if header.backing_format and driver:
        yield tuple(says if old.type == says.type else old for old in header.extensions)
    others = tuple(old for old in header.extensions if old.type != says.type)
    new = (says,) if driver else ()
    yield new + others
    yield new + tuple(old for old in others if old.type != ExtensionType.FEATURE_NAMES)


def _places(old: Header, new: Header, length: int) -> Iterator[int]:
    """Where the name could be: in the first sector, or where the old header has nothing."""
    end = new.extensions_end
    if end + length <= SECTOR_SIZE or not length:
        yield end
    if not length:
        return
    after = align_up(max(SECTOR_SIZE, end, old.extensions_end), 8)
    start, stop = old.backing_start, old.backing_start + len(old.encoded_backing_name)
    for place in (after, align_up(max(after, stop), 8)):
        is_free = place + length <= start or place >= stop
        if is_free and place + length <= new.cluster_size:
            yield place


def _writes(old: Header, new: Header) -> list[tuple[int, bytes]] | None:
    """Ordered writes, the last of which is one sector and makes the change; None: it takes more than that."""
    before, after = old.to_bytes(), new.to_bytes()
    name = new.encoded_backing_name
    extensions_end = new.extensions_end
    if after[SECTOR_SIZE:extensions_end] != before[SECTOR_SIZE:extensions_end]:
        return None
    # To the sector's end: what was there is of no use, and shorter writes may be torn by whoever is below.
    first = after[: min(SECTOR_SIZE, extensions_end)]
    start = new.backing_start
    if name and start + len(name) <= SECTOR_SIZE:
        first = after[: start + len(name)]
    first += bytes(SECTOR_SIZE - len(first))
    writes = [(0, first)]
    if name and start >= SECTOR_SIZE:
        writes.insert(0, (start, name))
    return writes
