"""The bits of bitmaps in an image: reading them, and writing all of them anew.

Theory of operation: while somebody writes to the disk, what the image has of bitmaps is out of date, and the directory
says so (`IN_USE`), on the disk before the first write is. When that is over bits, tables and a new directory are
written where the image is free; the header then names the new directory, and only then the old clusters are given up.
Whatever crashes, bitmaps are right or said to be wrong.

Context: the control loop; nothing is in flight in the node. Knows nothing about who records what.
"""

from __future__ import annotations

import errno
from collections.abc import AsyncIterator
from dataclasses import replace

from vhostblk.block.drivers.qcow2.bitmaps import (
    ALL_ONES,
    BitmapDirectory,
    BitmapEntry,
    BitmapFlag,
    bytes_needed,
    load_directory,
    load_table,
    used_by,
)
from vhostblk.block.drivers.qcow2.entries import OFFSET_MASK
from vhostblk.block.drivers.qcow2.extensions import ExtensionType
from vhostblk.block.drivers.qcow2.header import AutoClear, Header
from vhostblk.block.drivers.qcow2.header_change import change
from vhostblk.block.drivers.qcow2.metadata import Metadata
from vhostblk.block.drivers.qcow2.tables import read_bytes
from vhostblk.block.edge import Edge
from vhostblk.block.iov import IoVec
from vhostblk.block.lean_dataclass import lean_dataclass
from vhostblk.errors import BlockError, ImageError

# Of all bitmaps of an image together, in memory.
_MOST_BYTES = 1 << 30

Place = tuple[int, int]
"""Offset and length."""


@lean_dataclass(frozen=True, slots=True)
class Bits:
    """A bitmap to be stored.

    Attributes: entry: what the directory is going to say, but for where. bits: None: they stay as and where they are.
    """

    entry: BitmapEntry
    bits: bytes | None = None


class BitmapStore:
    """The bitmaps of an image that is open.

    Attributes: directory: as it is on the disk.
    """

    def __init__(self, file: Edge, header: Header, directory: BitmapDirectory) -> None:
        self.directory = directory
        self._file = file
        self._header = header

    @classmethod
    async def load(cls, file: Edge, header: Header) -> BitmapStore:
        """Read the directory.

        Raises:
            BlockError: the child's errno.
            ImageError: it makes no sense, or all bitmaps together are too large.
        """
        directory = await load_directory(file, header)
        total = sum(bytes_needed(header.size, one.granularity) for one in directory.bitmaps)
        if total > _MOST_BYTES:
            raise ImageError(f"Bitmaps would take {total} bytes of memory")
        return cls(file, header, directory)

    def find(self, name: str) -> BitmapEntry | None:
        """What the directory says about this one."""
        return next((one for one in self.directory.bitmaps if one.name == name), None)

    async def bits(self, entry: BitmapEntry) -> bytes:
        """The bits of a bitmap that is not in use.

        Raises:
            BlockError: the child's errno.
            ImageError: its table is wrong.
        """
        size = self._header.cluster_size
        wanted = bytes_needed(self._header.size, entry.granularity)
        if entry.table_entries != -(-wanted // size):
            raise ImageError(f"Bitmap '{entry.name}': its table is of another size than the disk's")
        bits = bytearray(wanted)
        table = await load_table(self._file, self._header, entry)
        for number, place in enumerate(table):
            start = number * size
            end = min(start + size, wanted)
            if place & OFFSET_MASK:
                bits[start:end] = await read_bytes(self._file, place & OFFSET_MASK, end - start)
            elif place & ALL_ONES:
                bits[start:end] = b"\xff" * (end - start)
        return bytes(bits)

    async def mark_in_use(self, names: set[str]) -> None:
        """What the image has of these bitmaps is about to be out of date; that is on the disk when this returns.

        Raises:
            BlockError: the child's errno.
        """
        marked = tuple(
            replace(one, flags=one.flags | BitmapFlag.IN_USE) if one.name in names else one
            for one in self.directory.bitmaps
        )
        if marked != self.directory.bitmaps:
            # In place, though a crash may leave some of it undone: nobody has written to the disk yet.
            directory = replace(self.directory, bitmaps=marked)
            await self._file.pwritev(directory.offset, IoVec.of(directory.to_bytes()))
            await self._file.flush()
            self.directory = directory

    # ------------------------------------------------------------------ writing

    async def store(self, metadata: Metadata, wanted: list[Bits]) -> None:
        """These, and no others, are the image's bitmaps when this returns.

        Raises:
            BlockError: the child's errno; EFBIG: there is no room in the header. The image has the old ones or the new.
            ImageError: a table is wrong.
        """
        replaced = [place async for place in self._replaced(wanted)]
        taken: list[Place] = []
        try:
            entries = [await self._write_bitmap(metadata, one, taken) for one in wanted]
            directory = BitmapDirectory(bitmaps=tuple(entries))
            if entries:
                data = directory.to_bytes()
                offset = await self._write_anew(metadata, data, taken)
                directory = replace(directory, offset=offset, length=len(data))
            await metadata.finish()
            await self._file.flush()
        except BaseException:
            for offset, length in taken:
                await metadata.refcounts.release(offset, length)
            raise
        extensions = [
            one for one in metadata.header.extensions if one.type != ExtensionType.BITMAPS
        ]
        autoclear = metadata.header.autoclear & ~AutoClear.BITMAPS
        if entries:
            extensions.append(directory.extension())
            autoclear |= AutoClear.BITMAPS
        try:
            await metadata.change_header(
                lambda header: change(
                    header, replace(header, extensions=tuple(extensions), autoclear=autoclear)
                )
            )
        except ImageError as error:
            # Nothing was written.
            for offset, length in taken:
                await metadata.refcounts.release(offset, length)
            raise BlockError(errno.EFBIG, str(error)) from None
        places = metadata.refcounts.places
        for offset, length in replaced:
            places.remove(offset, length)
            metadata.refcounts.give_up(offset, length)
        size = self._header.cluster_size
        places.add_all(
            cluster for start, length in taken for cluster in range(start, start + length, size)
        )
        self.directory = directory
        self._header = metadata.header
        await metadata.finish()

    async def _replaced(self, wanted: list[Bits]) -> AsyncIterator[Place]:
        """What nobody needs when those are stored."""
        if not self.directory.length:
            return
        yield self.directory.offset, self.directory.length
        kept = {one.entry.name for one in wanted if one.bits is None}
        for entry in self.directory.bitmaps:
            if entry.name not in kept:
                for offset in used_by(await load_table(self._file, self._header, entry)):
                    yield offset, self._header.cluster_size
                yield entry.table_offset, entry.table_bytes

    async def _write_bitmap(self, metadata: Metadata, one: Bits, taken: list[Place]) -> BitmapEntry:
        if one.bits is None:
            return one.entry
        size = self._header.cluster_size
        table = []
        for start in range(0, len(one.bits), size):
            piece = one.bits[start : start + size]
            if piece.count(0) == len(piece):
                table.append(0)
            elif piece.count(0xFF) == size:
                table.append(ALL_ONES)
            else:
                table.append(await self._write_anew(metadata, piece.ljust(size, b"\0"), taken))
        data = b"".join(entry.to_bytes(8) for entry in table)
        offset = await self._write_anew(metadata, data, taken)
        return replace(one.entry, table_offset=offset, table_entries=len(table))

    async def _write_anew(self, metadata: Metadata, data: bytes, taken: list[Place]) -> int:
        clusters = -(-len(data) // self._header.cluster_size)
        offset = await metadata.room_for(clusters)
        taken.append((offset, clusters * self._header.cluster_size))
        await self._file.pwritev(offset, IoVec.of(data))
        return offset
