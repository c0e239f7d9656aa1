"""Since when the oldest request in flight has been so, without a list of them.

Theory of operation: requests are in two halves, of which one is older than the other. When the last one of the older
half ends, the younger half is the older one from then on. So what is told is not later than the truth, and earlier by
not more than the older half took to come together: by nothing when a request was alone, by about a latency under load.

The engine's twin is native/src/ages.h.
"""

from __future__ import annotations


class Ages:
    """See the module. Context: one thread."""

    __slots__ = ("_count", "_older", "_since")

    def __init__(self) -> None:
        self._since = [0, 0]
        self._count = [0, 0]
        self._older = 0  # not empty, unless both are

    def begin(self, now: int) -> int:
        """A request has begun; gives the half it is in, for `end`."""
        half = self._older ^ 1 if self._count[self._older] else self._older
        if not self._count[half]:
            self._since[half] = now
        self._count[half] += 1
        return half

    def end(self, half: int) -> None:
        """It has ended."""
        self._count[half] -= 1
        if half == self._older and not self._count[half] and self._count[half ^ 1]:
            self._older ^= 1

    @property
    def oldest(self) -> int:
        """No request in flight has begun before that; 0: none is in flight."""
        return self._since[self._older] if self._count[self._older] else 0
