"""What a disk may hold: a model of bytes, for requests that overlap, fail, are cancelled, or lose power.

Theory of operation: time is a count of events. For each segment of the disk the model knows the *candidates*: the
writes of which one has decided what is read. A write that has succeeded rules out all that had ended before it began;
one that failed or was cancelled rules out nobody, and joins. A read may see a candidate, or any write that was going on
meanwhile; what it sees while nobody writes is what all later ones have to see.

Beside that it knows what the storage may hold after a power cut: whatever was written since the last promise. A flush
that succeeds promises what was there when it began, a FUA write itself.

Bytes that a discard has touched may be anything. Knows nothing about nodes.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

__all__ = ["DiskModel", "Flush", "Read", "Write"]

_NOISE = random.Random(1).randbytes(1 << 18)
_INITIAL = 0


@dataclass(eq=False)
class Write:
    """A request that changes the disk; `content` None: nobody knows into what."""

    offset: int
    content: bytes | None
    length: int
    began: int
    ended: int = 0
    name: str = ""

    @property
    def end(self) -> int:
        return self.offset + self.length

    def bytes_of(self, start: int, end: int) -> bytes | None:
        return (
            None if self.content is None else self.content[start - self.offset : end - self.offset]
        )

    def __repr__(self) -> str:
        return f"<{self.name} {self.offset}..{self.end} began {self.began} ended {self.ended}>"


@dataclass
class _Segment:
    """A part of the disk that no request has ever cut."""

    start: int
    end: int
    candidates: set[Write]
    durable: set[Write]
    active: set[Write] = field(default_factory=set)

    def cut(self, at: int) -> _Segment:
        """Keep what is before `at`; returns the rest."""
        rest = _Segment(at, self.end, set(self.candidates), set(self.durable), set(self.active))
        self.end = at
        return rest


@dataclass(eq=False)
class Read:
    """A read that is going on."""

    offset: int
    length: int
    seen: list[_Segment]
    """What it may see: copies, with the writes that came meanwhile as active."""


@dataclass(eq=False)
class Flush:
    """A flush that is going on: what it promises, with the writes that came meanwhile."""

    promised: list[_Segment]


class DiskModel:
    """See the module.

    Args:
        length: bytes of the disk, all zero.
    """

    def __init__(self, length: int) -> None:
        zeroes = Write(0, bytes(length), length, 0, name="initial")
        self.length = length
        self._now = 0
        self._segments = [_Segment(0, length, {zeroes}, {zeroes})]
        self._reads: set[Read] = set()
        self._flushes: set[Flush] = set()

    # ------------------------------------------------------------------ requests

    def begin_write(self, offset: int, content: bytes, name: str = "write") -> Write:
        """A write is about to be asked for."""
        return self._begin(offset, content, len(content), name)

    def begin_discard(self, offset: int, length: int) -> Write:
        """A discard is about to be asked for."""
        return self._begin(offset, None, length, "discard")

    def _begin(self, offset: int, content: bytes | None, length: int, name: str) -> Write:
        self._now += 1
        write = Write(offset, content, length, self._now, name=name)
        for segment in self._range(self._segments, offset, offset + length):
            segment.active.add(write)
            segment.durable.add(write)
        going_on: list[Read | Flush] = [*self._reads, *self._flushes]
        for other in going_on:
            segments = other.seen if isinstance(other, Read) else other.promised
            for segment in self._range(segments, offset, offset + length):
                segment.active.add(write)
        return write

    def end_write(self, write: Write, succeeded: bool, durable: bool = False) -> None:
        """It is over.

        Args:
            durable: it was promised to survive a power cut.
        """
        self._now += 1
        write.ended = self._now
        for segment in self._range(self._segments, write.offset, write.end):
            segment.active.discard(write)
            if succeeded:
                segment.candidates = {old for old in segment.candidates if old.ended >= write.began}
            segment.candidates.add(write)
            if succeeded and durable:
                # Not what it rules out for reads: a write that came while this one went on may have been overwritten
                # by another that is lost.
                segment.durable = {
                    old
                    for old in segment.durable
                    if old in segment.active or old.ended >= write.began
                }
                segment.durable.add(write)

    def begin_read(self, offset: int, length: int) -> Read:
        """A read is about to be asked for."""
        seen = [
            _Segment(
                segment.start, segment.end, set(segment.candidates), set(), set(segment.active)
            )
            for segment in self._range(self._segments, offset, offset + length)
        ]
        read = Read(offset, length, seen)
        self._reads.add(read)
        return read

    def end_read(self, read: Read, content: bytes | None) -> None:
        """It is over.

        Args:
            content: None: it failed.

        Raises:
            AssertionError: that cannot have been there.
        """
        self._reads.discard(read)
        if content is None:
            return
        assert len(content) == read.length
        for segment in read.seen:
            part = content[segment.start - read.offset : segment.end - read.offset]
            _check(segment.start, part, segment.candidates | segment.active, "read")
            if not segment.active:
                self._settle(segment, part)

    def _settle(self, seen: _Segment, part: bytes) -> None:
        """Nobody has written while this was read: it is what is there."""
        ended = max(write.ended for write in seen.candidates)
        found = Write(seen.start, part, len(part), 0, ended, "settled")
        for segment in self._range(self._segments, seen.start, seen.end):
            # Others may have written since the read has ended its work; those stay.
            if segment.candidates <= seen.candidates:
                self._replace(segment, found)

    def _replace(self, segment: _Segment, found: Write) -> None:
        """`found` is what the candidates of a segment have come to, wherever those are listed."""
        before, segment.candidates = segment.candidates, {found}
        segment.durable.add(found)
        for flush in self._flushes:
            for promised in self._range(flush.promised, segment.start, segment.end):
                if (promised.candidates | promised.active) & before:
                    promised.candidates.add(found)

    def begin_flush(self) -> Flush:
        """A flush is about to be asked for."""
        promised = [
            _Segment(
                segment.start, segment.end, set(segment.candidates), set(), set(segment.active)
            )
            for segment in self._segments
        ]
        flush = Flush(promised)
        self._flushes.add(flush)
        return flush

    def end_flush(self, flush: Flush, succeeded: bool) -> None:
        """It is over."""
        self._flushes.discard(flush)
        if not succeeded:
            return
        for promised in flush.promised:
            for segment in self._range(self._segments, promised.start, promised.end):
                segment.durable &= promised.candidates | promised.active

    def resize(self, length: int) -> None:
        """The disk has another length; nobody was using what has gone or come."""
        if length > self.length:
            zeroes = Write(self.length, bytes(length - self.length), length - self.length, 0)
            zeroes.name = "grown"
            self._segments.append(_Segment(self.length, length, {zeroes}, {zeroes}))
        else:
            list(self._range(self._segments, length, self.length))
            self._segments = [segment for segment in self._segments if segment.end <= length]
            for flush in self._flushes:  # they promise nothing about what comes there later
                list(self._range(flush.promised, length, self.length))
                flush.promised = [part for part in flush.promised if part.end <= length]
        self.length = length

    # ------------------------------------------------------------------ what must be so

    def check(self, content: bytes) -> None:
        """That is what is there, and nobody uses the disk.

        Raises:
            AssertionError: it cannot be.
        """
        self.end_read(self.begin_read(0, self.length), content)

    def check_after_power_cut(self, kept: bytes, lost: list[tuple[int, bytes]]) -> None:
        """Power is gone.

        Args:
            kept: what the storage has for certain.
            lost: (offset, content) of what was in its cache: any of these may have been kept, too.

        Raises:
            AssertionError: a promise is broken.
        """
        for segment in self._segments:
            start, end = segment.start, segment.end
            allowed = segment.durable
            _check(start, kept[start:end], allowed, "after a power cut")
            for offset, content in lost:
                low, high = max(start, offset), min(end, offset + len(content))
                if low < high:
                    _check(low, content[low - offset : high - offset], allowed, "after a power cut")

    # ------------------------------------------------------------------

    @staticmethod
    def _range(segments: list[_Segment], start: int, end: int) -> list[_Segment]:
        """The segments of a range, cut where it begins and ends."""
        for at in (start, end):
            for index, segment in enumerate(segments):
                if segment.start < at < segment.end:
                    segments.insert(index + 1, segment.cut(at))
                    break
        return [segment for segment in segments if start <= segment.start and segment.end <= end]


def noise(seed: int, length: int) -> bytes:
    """Content that tells what it is and where it belongs."""
    start = seed * 4099 % (len(_NOISE) - length)
    return _NOISE[start : start + length]


def _check(start: int, part: bytes, allowed: set[Write], what: str) -> None:
    end = start + len(part)
    contents = [write.bytes_of(start, end) for write in allowed]
    if any(content is None or content == part for content in contents):
        return
    for position, value in enumerate(part):
        assert any(content is not None and content[position] == value for content in contents), (
            f"{what}: byte {start + position} is {value}, of {start}..{end}; "
            f"it may be from {sorted(allowed, key=lambda write: write.began)}"
        )
