"""Scratch buffers: alignment, reuse, bound."""

from __future__ import annotations

import pytest

from vhostblk.block.bounce import BouncePool, zeroes
from vhostblk.block.iov import address_of


@pytest.mark.parametrize("size", [0, 1, 512, 4096, 4097, 1 << 20])
@pytest.mark.parametrize("alignment", [1, 512, 4096, 1 << 16, 1 << 21])
def test_buffer_is_large_enough_aligned_and_writable(size: int, alignment: int) -> None:
    pool = BouncePool()
    buffer = pool.acquire(size, alignment)
    assert len(buffer) >= max(size, 1)
    assert address_of(buffer) % alignment == 0
    buffer[:] = b"x" * len(buffer)
    pool.release(buffer)


def test_released_buffer_is_used_again_and_two_are_never_the_same() -> None:
    pool = BouncePool()
    first, second = pool.acquire(5000), pool.acquire(5000)
    assert address_of(first) != address_of(second)
    address = address_of(first)
    pool.release(first)
    assert address_of(pool.acquire(6000)) == address


def test_what_is_kept_is_bounded() -> None:
    pool = BouncePool(keep=8192)
    buffers = [pool.acquire(4096) for _ in range(5)]
    addresses = {address_of(buffer) for buffer in buffers}
    for buffer in buffers:
        pool.release(buffer)
    again = [pool.acquire(4096) for _ in range(5)]
    assert pool._kept == 0
    assert len({address_of(buffer) for buffer in again} & addresses) >= 2


def test_zeroes_are_zeroes() -> None:
    assert bytes(zeroes(10_000)) == bytes(10_000)
