"""Invariant: any memory contents lead to chains, None or GuestError within bounded steps. For packed rings.

One input is as in `test_fuzz_split_ring.py`, but for::

    byte 0      queue size - 1, modulo 128
    byte 1      1: EVENT_IDX, 2: INDIRECT_DESC, 16: packed, which is set in all of these
    bytes 2-3   both places, as a base has them, little-endian; the slot is taken modulo the size
    the rest    guest memory: the ring at `BASE`, the driver's event structure at `AVAIL`, the device's at
                `USED`, anything from `DATA`

`corpus/packed_ring` is written by `python -m tests.fuzz.test_fuzz_packed_ring`.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.test_fuzz_split_ring import (
    AVAIL,
    BASE,
    DATA,
    INDIRECT,
    MEMORY,
    NEXT,
    READ,
    USED,
    WRITE,
    CountingMemory,
    at,
    outcomes_of_mutations,
)
from vhostblk.errors import GuestError
from vhostblk.virtio.blk import HEADER, SEGMENT
from vhostblk.virtio.blk_request import parse
from vhostblk.virtio.chain import Broken, copy_from, total
from vhostblk.virtio.packed import DESC, PackedVirtqueue
from vhostblk.virtio.virtqueue import INDIRECT_ENTRIES_MIN

CORPUS = Path(__file__).parent / "corpus" / "packed_ring"
PACKED = 16
IS_AVAIL, IS_USED = 1 << 7, 1 << 15
FIRST = 0x8000
"""Slot 0 in a round with a wrap counter of 1."""


def parameters(data: bytes) -> tuple[int, int, int]:
    """Size, flags and base of an input."""
    length, flags, place = struct.unpack("<BBH", data[:4].ljust(4, b"\0"))
    size = 1 + length % 128
    place = place & 0x8000 | (place & 0x7FFF) % size
    return size, flags, place | place << 16


def device(data: bytes, memory: CountingMemory) -> PackedVirtqueue:
    """What serves an input."""
    size, flags, base = parameters(data)
    return PackedVirtqueue(
        memory,
        size,
        BASE,
        BASE + AVAIL,
        BASE + USED,
        base=base,
        event_idx=bool(flags & 1),
        indirect=bool(flags & 2),
    )


def run(data: bytes) -> Broken | None:
    """Serve one input to the end and check the invariant.

    Returns:
        Why the queue broke, or None.
    """
    buffer = bytearray(data[4 : 4 + MEMORY].ljust(MEMORY, b"\0"))
    memory = CountingMemory(BASE, buffer)
    queue = device(data, memory)
    longest = queue.size + max(queue.size, INDIRECT_ENTRIES_MIN) + 1
    queue.enable_notification()
    # The ring can be filled again behind us, by a status that is written there: not for ever.
    for _ in range(4 * queue.size):
        memory.views = 0
        before = queue.base
        chain = None
        try:
            chain = queue.pop()
        except GuestError:
            assert queue.broken is not None
            assert queue.base == before
        assert memory.views <= longest
        if chain is None:
            break
        assert queue.base != before
        copy_from(chain.readable, total(chain.readable))
        try:
            request = parse(chain, capacity=1 << 20, max_segments=4)
        except GuestError as error:
            assert not total(chain.writable)
            queue.break_queue(error)
            queue.push(chain.head, 0)
            break
        queue.push(chain.head, request.complete(request.status or 0, request.length))
        queue.needs_notification()
    assert queue.in_flight == 0
    assert queue.base >> 16 == queue.base & 0xFFFF
    return queue.broken


# ---------------------------------------------------------------- corpus


def image(
    descriptors: list[tuple[int, int, int]],
    *,
    size: int = 8,
    flags: int = 3,
    place: int = FIRST,
    head: int = 5,
    data: bytes = b"",
) -> bytes:
    """Build an input: descriptors are (offset in memory or address, length, flags), all available."""
    memory = bytearray(MEMORY)
    position = (place & 0x7FFF) + (0 if place & 0x8000 else size)
    for i, (address, length, descriptor_flags) in enumerate(descriptors):
        here = (position + i) % (2 * size)
        whose = IS_AVAIL if here < size else IS_USED
        DESC.pack_into(
            memory, 16 * (here % size), at(address), length, head + i, descriptor_flags | whose
        )
    memory[DATA : DATA + len(data)] = data
    return struct.pack("<BBH", size - 1, flags | PACKED, place) + bytes(memory).rstrip(b"\0")


def table(*descriptors: tuple[int, int, int]) -> bytes:
    """Build an indirect table."""
    return b"".join(DESC.pack(at(d[0]), d[1], 0, d[2]) for d in descriptors)


GOOD = [(DATA, 16, NEXT), (0x1200, 512, NEXT | WRITE), (0x1100, 1, WRITE)]


def seeds() -> Iterator[tuple[str, bytes, Broken | None]]:
    """Name, input and expected outcome of every corpus file."""
    yield "empty", image([]), None
    yield "read", image(GOOD, data=READ), None
    yield "reads", image(GOOD * 2, data=READ), None
    yield "wrap", image(GOOD * 2, data=READ, place=FIRST | 5, size=7), None
    yield "second_round", image(GOOD * 2, data=READ, place=4, size=6), None
    yield "single_entry_ring", image([(0x1100, 1, WRITE)], size=1), None
    two = SEGMENT.pack(1, 2, 0) + SEGMENT.pack(2**64 - 1, 9, 1)
    discard = [(DATA, 48, NEXT), (0x1100, 1, WRITE)]
    yield "discard", image(discard, data=HEADER.pack(11, 0, 0) + two), None
    inner = table((DATA, 16, 0), (0x1200, 512, WRITE | NEXT | INDIRECT), (0x1100, 1, WRITE))
    outer = [(DATA + 16, len(inner), INDIRECT | WRITE)]
    yield "indirect", image(outer * 3, data=READ + inner), None
    # The second request's first descriptor is not there any more when its turn comes.
    own = [(DATA, 16, NEXT), (16 * 2 + 14, 1, WRITE)]
    yield "status_in_the_ring", image(own + GOOD, data=HEADER.pack(4, 0, 0)), None
    yield "loop", image([(DATA, 1, NEXT)] * 8), Broken.CHAIN_LOOP
    lost = (2**64 - 1, 512, NEXT | WRITE)
    yield "address_of_data", image([GOOD[0], lost, GOOD[2]], data=READ), None
    yield "address", image([(2**64 - 1, 2, 0)]), Broken.ADDRESS
    yield "order", image([(DATA, 1, NEXT | WRITE), (DATA, 1, 0)]), Broken.ORDER
    yield "no_status", image([(DATA, 16, 0)], data=READ), Broken.NO_STATUS
    yield "indirect_size", image([(DATA, 17, INDIRECT)]), Broken.INDIRECT
    yield "indirect_next", image([(DATA, 16, INDIRECT | NEXT)]), Broken.INDIRECT
    yield "indirect_behind", image([(DATA, 1, NEXT), (DATA, 16, INDIRECT)]), Broken.INDIRECT
    yield "indirect_not_negotiated", image([(DATA, 16, INDIRECT)], flags=0), Broken.INDIRECT
    yield (
        "indirect_order",
        image([(DATA, 32, INDIRECT)], data=table((DATA, 1, WRITE), (DATA, 1, 0))),
        Broken.ORDER,
    )


@pytest.mark.parametrize(
    ("name", "data", "broken"), list(seeds()), ids=[name for name, _, _ in seeds()]
)
def test_corpus_has_this_outcome(name: str, data: bytes, broken: Broken | None) -> None:
    assert (CORPUS / name).read_bytes() == data, f"python -m {__spec__.name} writes the corpus"
    assert run(data) == broken


def test_every_file_of_the_corpus_keeps_the_invariant() -> None:
    """Files that nobody wrote on purpose are findings of earlier runs."""
    for path in sorted(CORPUS.iterdir()):
        run(path.read_bytes())


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Change a few bytes, words or descriptors of an input."""
    out = bytearray(data.ljust(4 + DATA + 64, b"\0"))
    for _ in range(chance.choice((1, 2, 4, 16))):
        position = 4 + chance.randrange(160)
        match chance.randrange(4):
            case 0:
                out[position] ^= 1 << chance.randrange(8)
            case 1:
                out[chance.randrange(len(out))] = chance.choice((0, 1, 2, 4, 0x7F, 0x80, 0xFF))
            case 2:
                out[chance.randrange(4)] = chance.randrange(256)
                out[1] |= PACKED
            case 3:
                address = chance.choice((0, AVAIL, USED, DATA, DATA + 16, MEMORY - 1))
                DESC.pack_into(
                    out,
                    4 + 16 * chance.randrange(8),
                    chance.choice((BASE + address, BASE - 1, 2**64 - 1, chance.getrandbits(64))),
                    chance.choice((0, 1, 16, 32, 512, chance.getrandbits(32))),
                    chance.randrange(10),
                    chance.randrange(8) | chance.choice((IS_AVAIL, IS_AVAIL, IS_USED)),
                )
    return bytes(out)


def test_mutations_of_the_corpus_keep_the_invariant() -> None:
    outcomes = outcomes_of_mutations([data for _, data, _ in seeds()], mutated, run, 22)
    assert len(outcomes) >= 6, f"mutations are too tame: {outcomes}"


@settings(max_examples=200)
@given(st.binary(max_size=4 + MEMORY))
def test_arbitrary_bytes_keep_the_invariant(data: bytes) -> None:
    run(data)


if __name__ == "__main__":
    CORPUS.mkdir(parents=True, exist_ok=True)
    for seed_name, seed, _ in seeds():
        (CORPUS / seed_name).write_bytes(seed)
