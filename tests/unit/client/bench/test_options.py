"""What a benchmark can be asked for, and what contradicts itself."""

from __future__ import annotations

from typing import Any

import pytest

from vhostblk.client.bench.options import PATTERNS, BenchOptions, parse_pattern
from vhostblk.errors import ConfigError
from vhostblk.native.load import LoadOp


@pytest.mark.parametrize(
    ("text", "weights", "random"),
    [
        ("read", (1, 0, 0, 0, 0), False),
        ("randwrite", (0, 1, 0, 0, 0), True),
        ("flush", (0, 0, 1, 0, 0), False),
        ("write-zeroes", (0, 0, 0, 0, 1), False),
        ("read=70,write=20,discard=10", (70, 20, 0, 10, 0), True),
        ("write-zeroes=2,flush=1,write-zeroes=1", (0, 0, 1, 0, 3), True),
    ],
)
def test_pattern_says_operations_and_places(
    text: str, weights: tuple[int, ...], random: bool
) -> None:
    pattern = parse_pattern(text)
    assert (pattern.weights, pattern.random) == (weights, random)


@pytest.mark.parametrize("name", ["rw", "randrw"])
def test_mixed_pattern_takes_a_share_of_reads(name: str) -> None:
    assert parse_pattern(name).weights[:2] == (1, 1)
    assert parse_pattern(name, 30).weights == (30, 70, 0, 0, 0)
    assert parse_pattern(name, 30).random is PATTERNS[name].random


@pytest.mark.parametrize(
    ("text", "read_percent", "message"),
    [
        ("", None, "pattern ''"),
        ("reads", None, "pattern 'reads'"),
        ("read=", None, "pattern 'read='"),
        ("read=x", None, "pattern 'read=x'"),
        ("read=-1", None, "pattern 'read=-1'"),
        ("read=²", None, "pattern 'read=²'"),
        ("trim=1", None, "discard, write-zeroes"),
        ("read=1,", None, "pattern 'read=1,'"),
        ("read=0,write=0", None, "all weights are 0"),
        ("read=" + "9" * 5000, None, "weights up to"),
        ("read=1000001", None, "weights up to"),
        ("read", 50, "has not both reads and writes"),
        ("read=1,write=1", 50, "read-percent is for"),
    ],
)
def test_pattern_that_is_none_is_refused(text: str, read_percent: int | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_pattern(text, read_percent)


@pytest.mark.parametrize(
    ("depth", "indirect", "segments", "size"),
    [(1, True, 1, 128), (128, True, 8, 128), (129, True, 1, 256), (43, False, 1, 256)],
)
def test_ring_is_as_large_as_needed(depth: int, indirect: bool, segments: int, size: int) -> None:
    options = BenchOptions(depth=depth, indirect=indirect, segments=segments)
    assert options.ring_size == size
    options.check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"queue_size": 100}, "queue-size 100"),
        ({"queue_size": 65536}, "queue-size 65536"),
        ({"queue_size": 16}, "depth 32: 32 descriptors"),
        ({"queue_size": 64, "indirect": False}, "depth 32: 96 descriptors"),
        ({"depth": 16000, "segments": 8, "indirect": False}, "32768"),
        ({"block_min": 1000, "block_max": 1000}, "block-size 1000: a multiple of 512"),
        ({"block_min": 0, "block_max": 0}, "block-size 0"),
        ({"block_max": 2048}, "block-size 4096-2048"),
        ({"block_max": 6144}, "block-size 4096-6144"),
        ({"block_max": 128 << 20}, "64 MiB"),
        ({"segments": 9}, "segments 9"),
        ({"threads": 2}, "threads 2: there are only 1 queues"),
        ({"once": True}, "once: the pattern 'randread' has no end"),
        ({"once": True, "pattern": PATTERNS["flush"]}, "flushes have no end"),
        ({"offset": 100}, "multiples of 512"),
    ],
)
def test_options_that_contradict_themselves_are_refused(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        BenchOptions(**changes).check()


def test_every_operation_has_a_name_of_its_own() -> None:
    for op in LoadOp:
        name = op.name.lower().replace("_", "-")
        assert parse_pattern(f"{name}=1").has(op)
