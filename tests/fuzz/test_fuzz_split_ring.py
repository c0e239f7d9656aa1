"""Invariant: any memory contents lead to chains, None or GuestError within bounded steps.

One input is a byte string::

    byte 0      log2 of the queue size, modulo 8
    byte 1      1: EVENT_IDX, 2: INDIRECT_DESC
    bytes 2-3   base, little-endian
    the rest    guest memory from `BASE` on, up to `MEMORY` bytes: descriptors at `BASE`, the
                available ring at `AVAIL`, the used ring at `USED`, anything from `DATA`

`corpus/split_ring` holds one input per way to break a queue and per kind of good chain; it is
written by `python -m tests.fuzz.test_fuzz_split_ring`. VHOSTBLK_FUZZ_SECONDS makes the mutation of
the corpus run for that long instead of a few thousand inputs.
"""

from __future__ import annotations

import os
import random
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostblk.errors import GuestError
from vhostblk.virtio.blk import HEADER, SEGMENT
from vhostblk.virtio.blk_request import parse
from vhostblk.virtio.chain import Broken, copy_from, total
from vhostblk.virtio.memory import FlatMemory
from vhostblk.virtio.split import DESC, INDIRECT_ENTRIES_MIN, SplitVirtqueue

CORPUS = Path(__file__).parent / "corpus" / "split_ring"
BASE, MEMORY = 0x10000, 0x2000
AVAIL, USED, DATA = 0x800, 0xA00, 0x1000
NEXT, WRITE, INDIRECT = 1, 2, 4


class CountingMemory(FlatMemory):
    """Guest memory that counts how often it is asked for a buffer."""

    def __init__(self, base: int, buffer: bytearray) -> None:
        super().__init__(base, buffer)
        self.views = 0

    def view(self, gpa: int, length: int) -> list[memoryview]:
        self.views += 1
        return super().view(gpa, length)


def run(data: bytes) -> Broken | None:
    """Serve one input to the end and check the invariant.

    Returns:
        Why the queue broke, or None.
    """
    exponent, flags, base = struct.unpack("<BBH", data[:4].ljust(4, b"\0"))
    size = 1 << exponent % 8
    buffer = bytearray(MEMORY)
    image = data[4 : 4 + MEMORY]
    buffer[: len(image)] = image
    memory = CountingMemory(BASE, buffer)
    queue = SplitVirtqueue(
        memory,
        size,
        BASE,
        BASE + AVAIL,
        BASE + USED,
        base=base,
        event_idx=bool(flags & 1),
        indirect=bool(flags & 2),
    )
    longest = size + max(size, INDIRECT_ENTRIES_MIN) + 1
    queue.enable_notification()
    # Nothing is pushed meanwhile, so no more chains than entries can be available.
    for _ in range(size + 1):
        memory.views = 0
        before = queue.next_avail
        chain = None
        try:
            chain = queue.pop()
        except GuestError:
            assert queue.broken is not None
        assert memory.views <= longest
        if chain is None:
            break
        assert chain.head < size
        assert queue.next_avail == before + 1 & 0xFFFF
        copy_from(chain.readable, total(chain.readable))
        try:
            request = parse(chain, capacity=1 << 20, max_segments=4)
        except GuestError as error:
            assert not total(chain.writable)
            queue.break_queue(error)
            queue.push(chain.head, 0)
            break
        if request.status is None:
            assert request.length == total(request.data)
            assert request.offset + request.length <= 1 << 20 or not request.data
        # Writing the status may rewrite rings and descriptors: a driver may well ask for that.
        queue.push(chain.head, request.complete(request.status or 0, request.length))
        queue.needs_notification()
    assert queue.in_flight == 0
    return queue.broken


# ---------------------------------------------------------------- corpus


def image(
    descriptors: list[tuple[int, int, int, int]],
    *,
    heads: tuple[int, ...] = (0,),
    idx: int | None = None,
    exponent: int = 3,
    flags: int = 3,
    base: int = 0,
    data: bytes = b"",
) -> bytes:
    """Build an input: descriptors are (offset in memory or address, length, flags, next)."""
    memory = bytearray(MEMORY)
    for i, (address, length, descriptor_flags, following) in enumerate(descriptors):
        DESC.pack_into(memory, 16 * i, at(address), length, descriptor_flags, following)
    end = base + len(heads) if idx is None else idx
    struct.pack_into("<HH", memory, AVAIL, 0, end & 0xFFFF)
    for i, head in enumerate(heads):
        position = base + i & (1 << exponent) - 1
        struct.pack_into("<H", memory, AVAIL + 4 + 2 * position, head)
    memory[DATA : DATA + len(data)] = data
    return struct.pack("<BBH", exponent, flags, base) + bytes(memory).rstrip(b"\0")


def at(address: int) -> int:
    """Small addresses are offsets in memory."""
    return BASE + address if address < MEMORY else address


def table(*descriptors: tuple[int, int, int, int]) -> bytes:
    """Build an indirect table."""
    return b"".join(DESC.pack(at(d[0]), *d[1:]) for d in descriptors)


READ = HEADER.pack(0, 0, 5)
GOOD = [(DATA, 16, NEXT, 1), (0x1200, 512, NEXT | WRITE, 2), (0x1100, 1, WRITE, 0)]


def seeds() -> Iterator[tuple[str, bytes, Broken | None]]:
    """Name, input and expected outcome of every corpus file."""
    yield "empty", b"", None
    yield "read", image(GOOD, data=READ), None
    yield "wrap", image(GOOD, data=READ, base=65535, heads=(0, 0)), None
    yield "single_entry_ring", image([(0x1100, 1, WRITE, 0)], exponent=0), None
    yield (
        "discard",
        image(
            [(DATA, 48, NEXT, 1), (0x1100, 1, WRITE, 0)],
            data=HEADER.pack(11, 0, 0) + SEGMENT.pack(1, 2, 0) + SEGMENT.pack(2**64 - 1, 9, 1),
        ),
        None,
    )
    inner = table((DATA, 16, NEXT, 1), (0x1200, 512, NEXT | WRITE, 2), (0x1100, 1, WRITE, 0))
    yield (
        "indirect",
        image([(DATA + 16, len(inner), INDIRECT, 0)], data=READ + inner),
        None,
    )
    yield "avail_idx", image([], idx=9), Broken.AVAIL_IDX
    yield "head", image([], heads=(8,)), Broken.HEAD
    yield "loop", image([(DATA, 1, NEXT, 0)]), Broken.CHAIN_LOOP
    yield "next", image([(DATA, 1, NEXT, 8)]), Broken.CHAIN_NEXT
    yield "address", image([(2**64 - 1, 2, 0, 0)]), Broken.ADDRESS
    lost = (2**64 - 1, 512, NEXT | WRITE, 2)
    yield "address_of_data", image([GOOD[0], lost, GOOD[2]], data=READ), None
    yield "order", image([(DATA, 1, NEXT | WRITE, 1), (DATA, 1, 0, 0)]), Broken.ORDER
    yield "no_status", image(GOOD[:1]), Broken.NO_STATUS
    yield "indirect_size", image([(DATA, 17, INDIRECT, 0)]), Broken.INDIRECT
    yield "indirect_next", image([(DATA, 16, INDIRECT | NEXT, 1)]), Broken.INDIRECT
    yield "indirect_not_negotiated", image([(DATA, 16, INDIRECT, 0)], flags=0), Broken.INDIRECT
    yield (
        "indirect_nested",
        image([(DATA, 16, INDIRECT, 0)], data=table((DATA, 16, INDIRECT, 0))),
        Broken.INDIRECT,
    )
    yield (
        "indirect_loop",
        image([(DATA, 32, INDIRECT, 0)], data=table((DATA, 1, NEXT, 1), (DATA, 1, NEXT, 0))),
        Broken.CHAIN_LOOP,
    )
    # The status byte lands in avail.idx: the driver moves its own ring by asking for a write.
    yield "status_in_avail_idx", image([(AVAIL + 2, 1, WRITE, 0)], exponent=0), None


@pytest.mark.parametrize(
    ("name", "data", "broken"), list(seeds()), ids=[name for name, _, _ in seeds()]
)
def test_corpus_has_this_outcome(name: str, data: bytes, broken: Broken | None) -> None:
    assert (CORPUS / name).read_bytes() == data, f"python -m {__spec__.name} writes the corpus"
    assert run(data) == broken


def test_corpus_holds_every_reason_a_ring_can_give() -> None:
    from_setup_or_host = {Broken.RING_ADDRESS, Broken.MEMORY_FAULT, Broken.LOG}
    assert {broken for _, _, broken in seeds()} == {None, *Broken} - from_setup_or_host


def test_every_file_of_the_corpus_keeps_the_invariant() -> None:
    """Files that nobody wrote on purpose are findings of earlier runs."""
    for path in sorted(CORPUS.iterdir()):
        run(path.read_bytes())


def mutated(chance: random.Random, data: bytes) -> bytes:
    """Change a few bytes, words or descriptors of an input."""
    out = bytearray(data.ljust(4 + DATA + 64, b"\0"))
    for _ in range(chance.choice((1, 2, 4, 16))):
        position = chance.randrange(len(out) - 1)
        match chance.randrange(4):
            case 0:
                out[position] ^= 1 << chance.randrange(8)
            case 1:
                out[position] = chance.choice((0, 1, 2, 4, 7, 8, 0x7F, 0x80, 0xFF))
            case 2:
                word = chance.choice((0, 1, 7, 8, 9, 0x7FFF, 0xFFFF))
                struct.pack_into("<H", out, position & ~1, word)
            case 3:
                index = chance.randrange(8)
                address = chance.choice((0, AVAIL, USED, DATA, DATA + 16, MEMORY - 1))
                DESC.pack_into(
                    out,
                    4 + 16 * index,
                    chance.choice((BASE + address, BASE - 1, 2**64 - 1, chance.getrandbits(64))),
                    chance.choice((0, 1, 16, 32, 512, chance.getrandbits(32))),
                    chance.randrange(8),
                    chance.randrange(10),
                )
    return bytes(out)


def outcomes_of_mutations(
    inputs: Sequence[bytes],
    mutated: Callable[[random.Random, bytes], bytes],
    run: Callable[[bytes], object],
    seed: int,
) -> set[object]:
    """What comes of mutated inputs, for VHOSTBLK_FUZZ_SECONDS, and at least 3000 of them."""
    seconds = float(os.environ.get("VHOSTBLK_FUZZ_SECONDS", "0"))
    chance = random.Random(seed)
    outcomes = set()
    deadline = time.monotonic() + seconds
    turns = 0
    while turns < 3000 or time.monotonic() < deadline:
        data = mutated(chance, chance.choice(inputs))
        turns += 1
        try:
            outcomes.add(run(data))
        except Exception as error:
            error.add_note(f"input: {data.rstrip(bytes(1)).hex()}")
            raise
    return outcomes


def test_mutations_of_the_corpus_keep_the_invariant() -> None:
    outcomes = outcomes_of_mutations([data for _, data, _ in seeds()], mutated, run, 20)
    assert len(outcomes) >= 8, f"mutations are too tame: {outcomes}"


@settings(max_examples=200)
@given(st.binary(max_size=4 + MEMORY))
def test_arbitrary_bytes_keep_the_invariant(data: bytes) -> None:
    run(data)


if __name__ == "__main__":
    CORPUS.mkdir(parents=True, exist_ok=True)
    for seed_name, seed, _ in seeds():
        (CORPUS / seed_name).write_bytes(seed)
