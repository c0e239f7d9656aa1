"""Parts of tables, in memory: read when somebody asks, written when it is time.

Theory of operation: a slice is clean, or dirty, or (`pins`) on its way to the disk. `take_dirty` makes all dirty slices
pinned at one moment; whoever has written them says so, or that it failed and they are dirty again. Only slices that are
neither go, the least recently used first, so the cache is as large as it may be, or as what waits to be written.

Context: the control loop. Knows nothing about what the numbers mean.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from vhostblk.block.drivers.qcow2.tables import Codec, Table, read_bytes
from vhostblk.block.edge import Edge

_LEAST = 4


@dataclass(slots=True, eq=False)
class Slice:
    """A part of a table: of an L2 table, or a block of reference counts.

    Attributes:
        offset: in the file.
        pins: whoever changed it and has not seen it written yet; until then it stays.
    """

    offset: int
    table: Table
    is_dirty: bool = False
    pins: int = 0


class TableCache:
    """Slices of tables, those used last, and all that have not been written yet.

    Args:
        file: where the tables are.
        codec: of their numbers.
        slice_bytes: of each slice.
        total_bytes: that slices may take in the file; some are always kept.
        load_event: what the file is told before one is read; None: nothing.
    """

    def __init__(
        self,
        file: Edge,
        codec: Codec,
        slice_bytes: int,
        total_bytes: int,
        load_event: str | None = None,
    ) -> None:
        self._load_event = load_event
        self.slice_bytes = slice_bytes
        self._file = file
        self._codec = codec
        self.limit(total_bytes)
        self._slices: OrderedDict[int, Slice] = OrderedDict()
        self._loading: dict[int, asyncio.Future[None]] = {}
        self._forgotten: set[int] = set()  # while they are loaded
        self._dirty: dict[int, Slice] = {}

    def limit(self, total_bytes: int) -> None:
        """Slices may take so much from now on."""
        self._most = max(total_bytes // self.slice_bytes, _LEAST)

    def __len__(self) -> int:
        return len(self._slices)

    @property
    def is_dirty(self) -> bool:
        """Whether something has to be written."""
        return bool(self._dirty)

    @property
    def is_full(self) -> bool:
        """Whether so much waits to be written that it is time: there is no room for what is read next."""
        return len(self._slices) > self._most and 2 * len(self._dirty) >= self._most

    async def get(self, offset: int) -> Slice:
        """The slice at this offset of the file. It may be gone from the cache after the next `await`, if it is clean.

        Raises:
            BlockError: the child's errno; the next one who asks tries again.
        """
        while (found := self._slices.get(offset)) is None:
            loading = self._loading.get(offset)
            if loading is None:
                return await self._load(offset)
            await asyncio.shield(loading)
        self._slices.move_to_end(offset)
        return found

    def find(self, offset: int) -> Slice | None:
        """The slice at this offset, if it is here."""
        found = self._slices.get(offset)
        if found is not None:
            self._slices.move_to_end(offset)
        return found

    def add(self, offset: int) -> Slice:
        """A new slice, all of it 0, that has to be written."""
        slice_ = Slice(offset, self._codec.decode(bytes(self.slice_bytes)))
        self._make_room()
        self._slices[offset] = slice_
        self.changed(slice_)
        return slice_

    def put(self, offset: int, data: bytes | bytearray) -> None:
        """What the file has there, for the next one who asks."""
        self._make_room()
        self._slices[offset] = Slice(offset, self._codec.decode(data))

    def changed(self, slice_: Slice) -> None:
        """It has to be written."""
        assert self._slices.get(slice_.offset) is slice_
        slice_.is_dirty = True
        self._dirty[slice_.offset] = slice_

    def take_dirty(self) -> list[Slice]:
        """Those that have to be written, which stay until `written` or `not_written`."""
        taken = list(self._dirty.values())
        self._dirty.clear()
        for slice_ in taken:
            slice_.is_dirty = False
            slice_.pins += 1
        return taken

    def writes(self, slices: list[Slice]) -> list[tuple[int, bytes]]:
        """Where to write which bytes."""
        return [(slice_.offset, self._codec.encode(slice_.table)) for slice_ in slices]

    def written(self, slices: list[Slice]) -> None:
        """What `take_dirty` gave is in the file."""
        for slice_ in slices:
            slice_.pins -= 1
        self._make_room(0)

    def not_written(self, slices: list[Slice]) -> None:
        """It is not; it still has to be."""
        for slice_ in slices:
            slice_.pins -= 1
            self.changed(slice_)

    def forget(self, offset: int) -> None:
        """What was at this offset is no table any more."""
        self._slices.pop(offset, None)
        self._dirty.pop(offset, None)
        if offset in self._loading:
            self._forgotten.add(offset)

    def clear(self) -> None:
        """Forget all; the image has changed. Nothing waits to be written."""
        assert not self._dirty
        self._slices.clear()

    async def _load(self, offset: int) -> Slice:
        loading = self._loading[offset] = asyncio.get_running_loop().create_future()
        try:
            if self._load_event is not None:
                await self._file.debug_event(self._load_event)
            data = await read_bytes(self._file, offset, self.slice_bytes)
        finally:
            del self._loading[offset]
            loading.set_result(None)
            forgotten = offset in self._forgotten
            self._forgotten.discard(offset)
        if forgotten:
            # Something else may be there by now: not for the next one who asks.
            return Slice(offset, self._codec.decode(data))
        self._make_room()
        loaded = self._slices[offset] = Slice(offset, self._codec.decode(data))
        return loaded

    def _make_room(self, more: int = 1) -> None:
        """Clean ones go, the least recently used first, until so many more fit."""
        while len(self._slices) + more > self._most:
            for offset, slice_ in self._slices.items():
                if not slice_.is_dirty and not slice_.pins:
                    del self._slices[offset]
                    break
            else:
                return
