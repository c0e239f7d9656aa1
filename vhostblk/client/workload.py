"""A random workload that knows what every sector must contain.

Seeded. Many requests of all kinds and sizes are in flight on all queues, cut into descriptors in all
ways. Requests in flight at the same time share no sector, unless all of them read, so every read
has one right answer; neighbours in one block of the host do meet, and that is where bugs live.

What a sector contains is undefined after a discard, until it is written again (VIRTIO 1.2 §5.2.6.2),
and after a request that failed; such sectors are not compared.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from vhostblk.client.client import Client, segments
from vhostblk.client.queue import Framing, Pending
from vhostblk.errors import PeerError, StateError
from vhostblk.virtio.blk import SECTOR, RequestType, Status
from vhostblk.virtio.features import Feature

__all__ = ["Counts", "Workload"]

_PIECES = 6
_TRIES = 20


@dataclass
class Counts:
    """What a workload has done."""

    requests: dict[RequestType, int] = field(default_factory=dict)
    errors: dict[RequestType, int] = field(default_factory=dict)
    read: int = 0
    """Bytes."""
    compared: int = 0
    """Bytes read that had a known value."""
    written: int = 0
    """Bytes."""


@dataclass(eq=False)
class _Operation:
    """A request in flight."""

    kind: RequestType
    ranges: Sequence[tuple[int, int]]
    """(first, count), sectors of the span."""
    data: bytes
    pending: Pending


class Workload:
    """A model of a part of a disk, and the requests that keep it true.

    Args:
        client: connected; borrowed.
        seed: of all choices.
        span: (offset, length) in bytes of the part to use; None: all of the disk, at most 64 MiB.
        depth: requests in flight on all queues together.
        max_length: bytes of the longest request.
        allow_errors: requests may fail; what they touched is unknown then.

    Context: the client's.
    """

    def __init__(
        self,
        client: Client,
        *,
        seed: int,
        span: tuple[int, int] | None = None,
        depth: int = 8,
        max_length: int = 64 << 10,
        allow_errors: bool = False,
    ) -> None:
        self.client = client
        self.seed = seed
        self.counts = Counts()
        self._random = random.Random(seed)
        offset, length = span or (0, min(client.capacity, 64 << 20))
        self._first = offset // SECTOR
        self._sectors = length // SECTOR
        self._depth = depth
        self._max_sectors = max(1, min(max_length // SECTOR, self._sectors))
        config, features = client.config, client.control.features
        if features & Feature.VIRTIO_BLK_F_SIZE_MAX and config.size_max >= SECTOR:
            self._max_sectors = min(self._max_sectors, config.size_max // SECTOR)
        self._allow_errors = allow_errors
        self._kinds = _kinds(features)
        self._content = bytearray(length)
        self._known = bytearray(self._sectors)
        self._flying: list[_Operation] = []

    def run(self, requests: int) -> Counts:
        """Make so many requests, wait for all of them, and check every answer.

        Raises:
            PeerError: a read returned something else than was written.
            BlockError: a request failed, and errors are not allowed.
            SessionError, TimeoutError: see `Client.wait`.
        """
        for _ in range(requests):
            while len(self._flying) >= self._depth:
                self._collect(self.client.wait_any())
            self._start()
        self._finish_all()
        return self.counts

    def verify(self) -> None:
        """Read the whole span and compare it with the model.

        Raises:
            PeerError: something differs.
        """
        for first in range(0, self._sectors, self._max_sectors):
            count = min(self._max_sectors, self._sectors - first)
            self._launch(RequestType.IN, [(first, count)], b"", 0)
            self._finish_all()

    # ---------------------------------------------------------------- starting

    def _start(self) -> None:
        chance = self._random
        kind = chance.choice(self._kinds)
        queue = chance.randrange(len(self.client.queues))
        ranges: list[tuple[int, int]] = []
        if kind != RequestType.FLUSH:
            ranges = self._free_ranges(kind)
        data = b""
        if kind == RequestType.OUT:
            data = chance.randbytes(ranges[0][1] * SECTOR)
        self._launch(kind, ranges, data, queue)

    def _free_ranges(self, kind: RequestType) -> list[tuple[int, int]]:
        """Pick ranges that nothing in flight conflicts with."""
        config = self.client.config
        count = 1
        if kind == RequestType.DISCARD:
            count = self._random.randint(1, max(1, min(config.max_discard_seg, 4)))
        elif kind == RequestType.WRITE_ZEROES:
            count = self._random.randint(1, max(1, min(config.max_write_zeroes_seg, 4)))
        tries = 0
        while True:
            ranges = [self._pick() for _ in range(count)]
            if not any(self._conflicts(kind, picked) for picked in ranges):
                return ranges
            tries += 1
            if tries % _TRIES == 0:
                self._collect(self.client.wait_any())

    def _pick(self) -> tuple[int, int]:
        chance = self._random
        longest = self._max_sectors
        count = min(longest, chance.choice((1, 1, 2, 7, 8, 8, 8, 16, chance.randint(1, longest))))
        first = chance.randint(0, self._sectors - count)
        if chance.random() < 0.5:
            first &= ~7
        return first, count

    def _conflicts(self, kind: RequestType, picked: tuple[int, int]) -> bool:
        first, count = picked
        return any(
            first < other + length and other < first + count
            for operation in self._flying
            if not operation.kind == kind == RequestType.IN
            for other, length in operation.ranges
        )

    def _framing(self) -> Framing | None:
        """Half of the requests look like Linux's; the others are cut anywhere."""
        chance = self._random
        if chance.random() < 0.5:
            return None

        def cut(length: int) -> list[int]:
            cuts = sorted(chance.randint(0, length) for _ in range(chance.randrange(_PIECES)))
            borders = [0, *cuts, length]
            return [b - a for a, b in itertools.pairwise(borders) if a < b]

        return cut

    def _launch(
        self, kind: RequestType, ranges: Sequence[tuple[int, int]], data: bytes, queue: int
    ) -> None:
        offset = room = 0
        out = data
        if kind in (RequestType.IN, RequestType.OUT):
            offset = (self._first + ranges[0][0]) * SECTOR
        if kind == RequestType.IN:
            room = ranges[0][1] * SECTOR
        elif kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
            unmap = kind == RequestType.WRITE_ZEROES and self._random.random() < 0.5
            out = segments(
                [((self._first + first) * SECTOR, count * SECTOR) for first, count in ranges],
                unmap=unmap,
            )
        framing = self._framing()
        while True:
            try:
                pending = self.client.submit(
                    kind, offset, out=out, room=room, queue=queue, framing=framing
                )
            except StateError:
                # No room in ring or memory: there is some when something has finished.
                if not self._flying:
                    raise
                self._collect(self.client.wait_any())
                continue
            break
        self._flying.append(_Operation(kind, ranges, data, pending))
        self.counts.requests[kind] = self.counts.requests.get(kind, 0) + 1

    # ---------------------------------------------------------------- finishing

    def _finish_all(self) -> None:
        self._collect(self.client.wait([operation.pending for operation in self._flying]))

    def _collect(self, finished: Sequence[Pending]) -> None:
        if not finished:
            return
        done = [operation for operation in self._flying if operation.pending.is_done]
        self._flying = [operation for operation in self._flying if not operation.pending.is_done]
        for operation in done:
            if operation.pending.status != Status.OK:
                self._fail(operation)
            else:
                self._succeed(operation)

    def _fail(self, operation: _Operation) -> None:
        if not self._allow_errors:
            operation.pending.result()
        self.counts.errors[operation.kind] = self.counts.errors.get(operation.kind, 0) + 1
        if operation.kind != RequestType.IN:
            self._forget(operation.ranges)

    def _succeed(self, operation: _Operation) -> None:
        match operation.kind:
            case RequestType.IN:
                self._compare(operation)
            case RequestType.OUT:
                self._store(operation.ranges[0], operation.data)
                self.counts.written += len(operation.data)
            case RequestType.WRITE_ZEROES:
                for picked in operation.ranges:
                    self._store(picked, bytes(picked[1] * SECTOR))
            case RequestType.DISCARD:
                self._forget(operation.ranges)

    def _store(self, picked: tuple[int, int], data: bytes) -> None:
        first, count = picked
        self._content[first * SECTOR : (first + count) * SECTOR] = data
        self._known[first : first + count] = b"\1" * count

    def _forget(self, ranges: Sequence[tuple[int, int]]) -> None:
        for first, count in ranges:
            self._known[first : first + count] = bytes(count)

    def _compare(self, operation: _Operation) -> None:
        ((first, count),) = operation.ranges
        content = operation.pending.result()
        self.counts.read += len(content)
        known = self._known[first : first + count]
        if all(known) and self._content[first * SECTOR : (first + count) * SECTOR] == content:
            self.counts.compared += len(content)
            return
        for i in range(count):
            if not known[i]:
                continue
            start = (first + i) * SECTOR
            expected = self._content[start : start + SECTOR]
            found = content[i * SECTOR : (i + 1) * SECTOR]
            if found != expected:
                at = next(k for k in range(SECTOR) if found[k] != expected[k])
                raise PeerError(
                    f"seed {self.seed}: read of {count} sectors at {self._first + first}: byte {at} of"
                    f" sector {self._first + first + i} is {found[at]:#x}, not {expected[at]:#x}"
                )
            self.counts.compared += SECTOR


def _kinds(features: int) -> list[RequestType]:
    """What to choose from; repeated to taste."""
    kinds = [RequestType.IN] * 4
    if features & Feature.VIRTIO_BLK_F_FLUSH:
        kinds += [RequestType.FLUSH]
    if not features & Feature.VIRTIO_BLK_F_RO:
        kinds += [RequestType.OUT] * 6
        if features & Feature.VIRTIO_BLK_F_DISCARD:
            kinds += [RequestType.DISCARD]
        if features & Feature.VIRTIO_BLK_F_WRITE_ZEROES:
            kinds += [RequestType.WRITE_ZEROES]
    return kinds
