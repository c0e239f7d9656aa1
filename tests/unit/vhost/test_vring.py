"""The control copy of a vring: what it accepts, and whose its fds are."""

from __future__ import annotations

import pytest

from vhostblk.errors import PeerError
from vhostblk.vhost.vring import Vring, VringFd, VringSnapshot


@pytest.mark.parametrize("size", [1, 2, 128, 32768])
def test_sizes_that_are_powers_of_two_are_accepted(size: int) -> None:
    vring = Vring(0)
    vring.set_size(size)
    vring.set_addresses(16, 2, 4)
    assert vring.snapshot().size == size


@pytest.mark.parametrize("size", [0, 32769, 65536, 2**32 - 1])
@pytest.mark.parametrize("packed", [False, True])
def test_impossible_sizes_are_refused(size: int, packed: bool) -> None:
    with pytest.raises(PeerError, match="from 1 to 32768"):
        Vring(0).set_size(size, packed=packed)


@pytest.mark.parametrize("size", [3, 129, 32767])
def test_only_packed_rings_have_sizes_that_are_no_powers_of_two(size: int) -> None:
    with pytest.raises(PeerError, match="power of two"):
        Vring(0).set_size(size)
    vring = Vring(0)
    vring.set_size(size, packed=True)
    vring.set_addresses(16, 4, 4)
    vring.check_ready(packed=True)
    with pytest.raises(PeerError, match="power of two"):
        vring.check_ready()


def test_driver_area_of_a_packed_ring_is_aligned_to_four() -> None:
    vring = Vring(0)
    vring.set_size(8)
    vring.set_addresses(16, 2, 4)
    vring.check_ready()
    with pytest.raises(PeerError, match="driver area"):
        vring.check_ready(packed=True)


def test_base_of_a_packed_ring_has_two_places_and_begins_with_wrap_counters_of_one() -> None:
    vring = Vring(0)
    assert vring.base(packed=True) == 0x8000_8000
    assert vring.base() == 0
    vring.set_size(8)
    vring.set_addresses(16, 4, 4)
    vring.set_base(0x8003_0005, packed=True)
    assert vring.snapshot(packed=True).base == 0x8003_0005
    with pytest.raises(PeerError, match="16 bits"):
        vring.check_ready()
    vring.forget()
    assert vring.base(packed=True) == 0x8000_8000


def test_base_of_more_than_sixteen_bits_is_refused() -> None:
    vring = Vring(0)
    vring.set_base(0xFFFF)
    with pytest.raises(PeerError, match="16 bits"):
        vring.set_base(0x10000)
    assert vring.base() == 0xFFFF


@pytest.mark.parametrize("addresses", [(8, 2, 4), (16, 1, 4), (16, 2, 2)])
def test_misaligned_addresses_are_refused(addresses: tuple[int, int, int]) -> None:
    with pytest.raises(PeerError, match="misaligned"):
        Vring(0).set_addresses(*addresses)


def test_ring_is_ready_once_it_has_size_and_addresses() -> None:
    vring = Vring(1)
    with pytest.raises(PeerError, match="before its size"):
        vring.check_ready()
    vring.set_size(4)
    with pytest.raises(PeerError, match="before its addresses"):
        vring.check_ready()
    vring.set_addresses(0x1000, 0x2000, 0x3000)
    vring.check_ready()
    vring.set_base(7)
    assert vring.snapshot() == VringSnapshot(
        index=1,
        size=4,
        base=7,
        desc=0x1000,
        avail=0x2000,
        used=0x3000,
        kick_fd=None,
        call_fd=None,
        err_fd=None,
        enabled=False,
    )


def test_replaced_fd_is_given_back_once() -> None:
    vring = Vring(0)
    assert vring.set_fd(VringFd.CALL, 10) is None
    assert vring.set_fd(VringFd.CALL, 11) == 10
    assert vring.set_fd(VringFd.KICK, 12) is None
    assert sorted(vring.close()) == [11, 12]
    assert vring.close() == ()


def test_reset_forgets_all_but_the_fds() -> None:
    vring = Vring(0)
    vring.set_size(4)
    vring.set_addresses(16, 2, 4)
    vring.set_base(3)
    vring.set_fd(VringFd.ERR, 10)
    vring.is_started = vring.is_enabled = True
    vring.forget()
    assert (vring.base(), vring.is_started, vring.is_enabled) == (0, False, False)
    with pytest.raises(PeerError):
        vring.check_ready()
    assert vring.close() == (10,)
