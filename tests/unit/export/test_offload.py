"""What the engine is allowed to do by itself."""

from __future__ import annotations

import pytest

from tests.unit.block.fakes import ArrayNode
from vhostblk.block.backend import BlockBackend
from vhostblk.block.node import ExtentFlag, FlushTarget, HostExtent
from vhostblk.export import offload
from vhostblk.native import FLUSH_MISS, FLUSH_NOTHING

RW = ExtentFlag.READ | ExtentFlag.WRITE
R = ExtentFlag.READ
W = ExtentFlag.WRITE


def extent(start: int, end: int, flags: ExtentFlag = RW) -> HostExtent:
    return HostExtent(start, end - start, 7, start, flags)


@pytest.mark.parametrize(
    ("extents", "request_range", "read", "write"),
    [
        ([], (0, 10), False, False),
        ([], (0, 0), True, True),
        ([extent(0, 10)], (0, 10), True, True),
        ([extent(0, 100)], (90, 10), True, True),
        ([extent(0, 10)], (0, 11), False, False),
        ([extent(5, 10)], (4, 2), False, False),
        ([extent(0, 10, R)], (0, 10), True, False),
        ([extent(0, 10, W)], (0, 10), False, True),
        ([extent(0, 10), extent(10, 20)], (5, 10), True, True),
        ([extent(0, 10), extent(11, 20)], (5, 10), False, False),
        ([extent(0, 10), extent(10, 20, R)], (5, 10), True, False),
        ([extent(0, 10, R), extent(10, 20)], (10, 5), True, True),
        ([extent(0, 10), extent(10, 12), extent(12, 14)], (0, 14), True, True),
        ([extent(10, 20)], (0, 10), False, False),
    ],
)
def test_extents_cover_a_request_without_gaps_and_with_the_right(
    extents: list[HostExtent], request_range: tuple[int, int], read: bool, write: bool
) -> None:
    assert offload.covers(extents, *request_range, write=False) is read
    assert offload.covers(extents, *request_range, write=True) is write


def test_entry_is_the_engines_struct() -> None:
    flags = RW | ExtentFlag.FIXED
    assert offload.entry(HostExtent(512, 1024, 9, 4096, flags, 512, 4096)) == (
        *(512, 1024, 4096, 9, int(flags), 512, 4096),
    )
    assert offload.entry(HostExtent(0, 512, None, 0, ExtentFlag.NULL))[3] == -1


@pytest.mark.parametrize(
    ("target", "expected"),
    [(FlushTarget.NOTHING, FLUSH_NOTHING), (FlushTarget.ASK, FLUSH_MISS), (5, 5), (0, 0)],
)
def test_flush_target_in_the_engines_terms(
    target: int | FlushTarget, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = ArrayNode(4096)
    monkeypatch.setattr(node, "flush_target", lambda: target)
    backend = BlockBackend(node, "the test", writable=True)
    assert offload.flush_target(backend) == expected


def test_flush_words_are_no_fds() -> None:
    assert FLUSH_MISS < 0
    assert FLUSH_NOTHING < 0
    assert FLUSH_MISS != FLUSH_NOTHING
