"""Disks without a file: null-co and the RAM disk."""

from __future__ import annotations

import asyncio
import os
import random
import time

import pytest

from vhostblk.block.backend import BlockBackend
from vhostblk.block.drivers.memory import MemoryNode
from vhostblk.block.graph import BlockGraph
from vhostblk.block.iov import IoVec
from vhostblk.block.node import ExtentFlag, FlushTarget
from vhostblk.errors import ConfigError


def test_null_has_qemus_default_size_and_rounds_others_up() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        assert (await graph.add("null-co")).length == 1 << 30
        assert (await graph.add("null-co,size=1000")).length == 1024
        assert (await graph.add("null-co,size=0")).length == 0
        await graph.close_all()

    asyncio.run(scenario())


@pytest.mark.parametrize(("zeroes", "expected"), [("on", bytes(512)), ("off", b"x" * 512)])
def test_null_reads_zeroes_or_leaves_the_buffer(zeroes: str, expected: bytes) -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        backend = BlockBackend(
            await graph.add(f"null-co,read-zeroes={zeroes}"), "the test", writable=True
        )
        buffer = bytearray(b"x" * 512)
        await backend.preadv(512, IoVec.of(buffer))
        assert buffer == expected
        (extent,) = await backend.extents(0, 1)
        flags = ExtentFlag.READ | ExtentFlag.WRITE | ExtentFlag.NULL
        assert extent.flags == (flags | ExtentFlag.ZERO if zeroes == "on" else flags)
        assert (extent.fd, extent.length) == (None, 1 << 30)
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_null_with_latency_takes_its_time_and_gives_nothing_away() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add("null-co,latency-ns=2000000")
        backend = BlockBackend(node, "the test", writable=True)
        assert await backend.extents(0, 512) == []
        assert backend.flush_target() is FlushTarget.ASK
        for request in (
            backend.preadv(0, IoVec.of(bytearray(1))),
            backend.pwritev(0, IoVec.of(b"x")),
            backend.pwrite_zeroes(0, 512),
            backend.flush(),
        ):
            start = time.monotonic_ns()
            await request
            assert time.monotonic_ns() - start >= 2_000_000
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_memory_takes_only_what_was_written_and_gives_it_back_when_zeroed() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add("memory,size=1T,discard=unmap")
        assert isinstance(node, MemoryNode)
        backend = BlockBackend(node, "the test", writable=True)
        assert backend.length == 1 << 40
        assert backend.can_discard
        await backend.pwritev(1 << 39, IoVec.of(b"x" * 65536))
        assert os.fstat(node._fd).st_blocks * 512 == 65536
        await backend.pwrite_zeroes(1 << 39, 32768)
        assert os.fstat(node._fd).st_blocks * 512 == 32768
        await backend.pdiscard(1 << 39, 8 << 20)
        assert os.fstat(node._fd).st_blocks == 0
        (extent,) = await backend.extents(0, 1)
        assert extent.flags == ExtentFlag.READ | ExtentFlag.WRITE | ExtentFlag.INLINE
        assert extent.fd == node._fd
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_memory_that_cannot_be_had_is_refused_in_one_line() -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        with pytest.raises(ConfigError, match=r"(too large|'size'): 9223372036854775296"):
            await graph.add("memory,size=9223372036854775296")
        with pytest.raises(ConfigError, match="Parameter 'size' is missing"):
            await graph.add("memory")
        await graph.close_all()

    asyncio.run(scenario())


def test_memory_that_is_known_to_be_there_is_no_more_than_what_was_written() -> None:
    """Every read and write against a model, also where holes come to be, and where somebody else writes."""

    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add("memory,size=1M,discard=unmap")
        assert isinstance(node, MemoryNode)
        backend = BlockBackend(node, "the test", writable=True, resize=True)
        chance = random.Random(5)
        model = bytearray(1 << 20)
        for number in range(3000):
            offset, length = (
                chance.randrange(len(model)),
                chance.choice((1, 512, 4096, 9000, 70000)),
            )
            if chance.random() < 0.5:
                offset &= -4096
            end = min(offset + length, len(model))
            what = chance.choice(
                ["write", "write", "read", "read", "zero", "discard", "past us", "resize"]
            )
            data = chance.randbytes(end - offset)
            if what == "write":
                await backend.pwritev(offset, IoVec.of(data))
                model[offset:end] = data
            elif what == "past us":
                os.pwrite(node._fd, data, offset)
                model[offset:end] = data
            elif what == "zero":
                await backend.pwrite_zeroes(offset, end - offset, may_unmap=True)
                model[offset:end] = bytes(end - offset)
            elif what == "discard":
                await backend.pdiscard(offset & -4096, 4096)
                model[offset & -4096 : (offset & -4096) + 4096] = bytes(4096)
            elif what == "resize" and number % 10 == 0:
                size = max(offset & -512, 512)
                await backend.truncate(size)
                await backend.truncate(len(model))
                model[size:] = bytes(len(model) - size)
            buffer = bytearray(end - offset)
            before = await node.driver_allocated_size()
            await backend.preadv(offset, IoVec.of(buffer))
            assert buffer == model[offset:end], f"{what} {number}: {offset}+{length}"
            assert await node.driver_allocated_size() == before, "reading has filled a hole"
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())


def test_small_requests_in_memory_that_is_there_need_no_system_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def scenario() -> None:
        graph = BlockGraph()
        node = await graph.add("memory,size=1M")
        backend = BlockBackend(node, "the test", writable=True)
        await backend.pwritev(4096, IoVec.of(b"a" * 12288))
        with monkeypatch.context() as patch:
            patch.delattr(os, "pwrite")
            patch.delattr(os, "preadv")
            await backend.pwritev(8000, IoVec.of(b"b" * 5000))
            buffer = bytearray(8192)
            await backend.preadv(8192, IoVec.of(buffer))
        assert buffer == b"b" * 4808 + b"a" * 3384
        await backend.close()
        await graph.close_all()

    asyncio.run(scenario())
