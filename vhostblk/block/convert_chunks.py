"""What is copied at once of disks, and what of that is worth writing.

Theory of operation: runs (`convert_runs.py`) are cut into parts of bounded size. A chunk is one of them, or, where that
is asked for, as many short ones as have room in a worker's buffer, side by side.

Context: the control loop. Knows nothing about how chunks are read and written.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from vhostblk.block.backend import BlockBackend
from vhostblk.block.chain import skip_filters
from vhostblk.block.convert_options import LARGEST_BUFFER, ConvertOptions, Listener
from vhostblk.block.convert_runs import Kind, Runs, Sources
from vhostblk.block.iov import address_of
from vhostblk.block.limits import SECTOR_SIZE, align_down, align_up
from vhostblk.block.roles import cow_child
from vhostblk.block.sparse import is_zero, largest_power_of_two, pieces
from vhostblk.block.status import has_zero_init
from vhostblk.errors import BlockError

__all__ = ["Buffer", "Chunks", "Part"]

# What qemu-img copies at once: messages and per cents are in these steps.
_STEP = 2 << 20
# What we copy at once, because it costs less; and all that we hold, of several workers.
_CHUNK = 4 << 20
_BUFFERS = 64 << 20
# Short runs that are copied at once. A chunk of those costs us most of what it costs to have it, whatever is in it, and
# each of a few threads has enough to do with it. Where devices do the work, that is all there is to say. Where it is
# copies from and to page caches, one thread reads while another writes, a third has its turn next, and what they hold
# should not be much more than a processor's own cache: memory that has left it makes both copies slower.
_MOST_PARTS = 256
_CHUNK_OF_MANY = 16 << 20
_WORKERS_FOR_MANY = 4
_CHUNK_OF_CACHED = 4 << 20
_WORKERS_FOR_CACHED = 3


class Buffer:
    """Memory of one worker, aligned; the bytearray is for looking into it."""

    def __init__(self, size: int, alignment: int) -> None:
        self.data = bytearray(size + alignment)
        self.start = -address_of(self.data) % alignment
        self.view = memoryview(self.data)[self.start :]


@dataclass(frozen=True, slots=True)
class Part:
    """A part of a run.

    Attributes: place: of its bytes in the buffer.
    """

    offset: int
    count: int
    kind: Kind
    place: int = 0

    @property
    def end(self) -> int:
        """The byte behind the last."""
        return self.offset + self.count


class Chunks:
    """The disk that `sources` are, from the beginning to the end.

    Attributes:
        size: bytes of a buffer that any chunk has room in.
        alignment: of that buffer.
        step: bytes that messages and per cents are in.
        compressed: what is written is to be compressed.
        has_many: chunks have several parts, where they are short.
        workers: how many chunks are worth being copied at the same time.
        is_zero: the target reads as zeroes where nothing was written.

    Raises:
        BlockError: EINVAL: the target has clusters that cannot be written compressed.
    """

    def __init__(
        self, sources: Sources, target: BlockBackend, options: ConvertOptions, listener: Listener
    ) -> None:
        self._options = options
        self._total = sources.total
        limits, info = target.limits, target.node.info()
        self._cluster = info.cluster_size if info else 0
        self.compressed = options.compressed or bool(info and info.needs_compressed_writes)
        self.step = min(max(_STEP, limits.opt_transfer, limits.pdiscard_alignment), LARGEST_BUFFER)
        self.size = self.step
        users = (*sources.users, target)
        self.has_many = False
        self.workers = options.workers
        is_paced = bool(options.salvage or options.rate)
        if self.compressed and not 0 < self._cluster <= self.step:
            raise BlockError(errno.EINVAL, "invalid cluster size")
        if not self.compressed and not is_paced:
            self.has_many = not options.offload and all(user.may_map for user in users)
        most = _CHUNK
        if self.has_many:
            is_cached = not any(user.node.common.cache_direct for user in users)
            at_once = _WORKERS_FOR_CACHED if is_cached else _WORKERS_FOR_MANY
            self.workers = min(self.workers, at_once)
            most = _CHUNK_OF_CACHED if is_cached else _CHUNK_OF_MANY
        if not is_paced:
            most = min(most, _BUFFERS // self.workers)
            self.size = max(self.step, align_down(most, self.step))
        if self.compressed:
            self.size = align_down(self.size, self._cluster)
            self.step = self._cluster
        self.alignment = max(user.limits.opt_mem_alignment for user in users)
        self._block = max(
            largest_power_of_two(options.min_sparse) if options.min_sparse else 0,
            align_up(limits.request_alignment, SECTOR_SIZE),
        )
        self._runs = Runs(sources, options, listener, _find_backed(target, options))
        self.is_zero = options.is_zero or (
            options.is_new
            and bool(options.min_sparse)
            and not options.has_backing
            and has_zero_init(target.node)
        )
        # The run that is being cut.
        self._kind = Kind.DATA
        self._kind_until = 0
        self._offset = 0

    def is_copied(self, kind: Kind) -> bool:
        """Whether such a run is written as data."""
        return kind is Kind.DATA or (kind is Kind.ZERO and not self._options.min_sparse)

    async def count(self) -> int:
        """Bytes that are copied; to be asked first, and once.

        Raises:
            BlockError: the status is not to be had; the listener knows.
        """
        offset = copied = 0
        while offset < self._total:
            if not self._knows(offset):
                await self._ask(offset)
            count = self._cut(offset)
            if self.is_copied(self._kind):
                copied += count
            offset += count
        self._kind_until = 0
        self._runs.rewind()
        return copied

    async def claim(self) -> list[Part]:
        """The next chunk, of what needs anything; nothing: that was all. One caller at a time.

        Raises:
            BlockError: the status is not to be had; the listener knows.
        """
        parts: list[Part] = []
        place = 0
        most = _MOST_PARTS if self.has_many else 1
        while self._offset < self._total and len(parts) < most:
            if not self._knows(self._offset):
                await self._ask(self._offset)
            count, kind = self._cut(self._offset), self._kind
            if self.is_copied(kind):
                count = min(count, self.size)
                if parts and place + count > self.size:
                    break
                parts.append(Part(self._offset, count, kind, place))
                place = align_up(place + count, self.alignment)
            elif kind is Kind.ZERO and not self.is_zero:
                parts.append(Part(self._offset, count, kind))
            self._offset += count
        return parts

    def _knows(self, offset: int) -> bool:
        """Whether the next part can be cut without asking: most can, and there are many."""
        if self._kind_until > offset:
            return True
        run = self._runs.next_known(offset)
        if run is None:
            return False
        count, self._kind = run
        self._kind_until = offset + count
        return True

    async def _ask(self, offset: int) -> None:
        count, self._kind = await self._runs.next(offset)
        self._kind_until = offset + count

    def _cut(self, offset: int) -> int:
        """Bytes of the next part; what it is is `_kind` then."""
        count = self._kind_until - offset
        if self._kind is Kind.DATA:
            count = min(count, self._largest(offset))
        if self.compressed:
            # Only whole clusters can be.
            if count < self._cluster:
                count = min(self._cluster, self._total - offset)
                self._kind = Kind.DATA
            else:
                count = align_down(count, self._cluster)
        return count

    def _largest(self, offset: int) -> int:
        """Bytes of a part; where it matters, zeroes are looked for in the same pieces as by qemu-img."""
        if self.compressed or not self._options.min_sparse:
            return self.size
        is_same = not offset % self._block and self._options.min_sparse <= self._block
        return self.size if is_same else self.step

    def pieces(self, buffer: Buffer, part: Part) -> list[tuple[int, memoryview, bool]]:
        """What of a part that is copied is worth writing: where, the bytes, and whether they are not just zeroes."""
        start = buffer.start + part.place
        shift = part.offset - start
        return [
            (at + shift, buffer.view[at - buffer.start : end - buffer.start], is_data)
            for at, end, is_data in self._places(buffer.data, start, start + part.count, part)
        ]

    def _places(
        self, data: bytearray, start: int, end: int, part: Part
    ) -> list[tuple[int, int, bool]]:
        least = self._options.min_sparse
        if not least:
            return [(start, end, True)]
        if not self.compressed:
            return list(pieces(data, start, end, part.offset, self._block, least))
        # A cluster is zeroes as a whole, or it is written as a whole.
        found: list[tuple[int, int, bool]] = []
        for at in range(start, end, self._cluster):
            stop = min(at + self._cluster, end)
            is_data = not is_zero(data, at, stop)
            if found and found[-1][2] == is_data:
                found[-1] = found[-1][0], stop, is_data
            else:
                found.append((at, stop, is_data))
        return found


def _find_backed(target: BlockBackend, options: ConvertOptions) -> int:
    """Up to where the backing file of a new target shows something; -1: that does not matter."""
    edge = cow_child(skip_filters(target.node))
    if options.has_backing and options.is_new and edge is not None:
        return edge.node.length
    return -1
