"""What a back-end tells the next one, in bytes."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vhostblk.errors import PeerError
from vhostblk.vhost.device_state import STATE_SIZE, DeviceState

STATE = DeviceState(capacity=1 << 40, writeback=True, is_drivers=False)


@given(st.builds(DeviceState, st.integers(0, 2**64 - 1), st.booleans(), st.booleans()))
def test_state_comes_back_as_it_was(state: DeviceState) -> None:
    assert len(state.pack()) == STATE_SIZE
    assert DeviceState.unpack(state.pack()) == state


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not one of vhostblk's"),
        (b"qemu" * 7, "not one of vhostblk's"),
        (STATE.pack()[:9], "ends after 9 bytes"),
        (STATE.pack()[:-1], "27 bytes where 28 belong"),
        (STATE.pack() + b"\0", "29 bytes where 28 belong"),
        (STATE.pack()[:8] + b"\2\0\0\0" + STATE.pack()[12:], "version 2, 1 is known"),
    ],
)
def test_what_is_no_state_is_refused_for_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(PeerError, match=reason):
        DeviceState.unpack(data)


@given(st.integers(0, STATE_SIZE * 8 - 1))
def test_no_flipped_bit_is_taken_for_a_state(bit: int) -> None:
    data = bytearray(STATE.pack())
    data[bit // 8] ^= 1 << bit % 8
    with pytest.raises(PeerError):
        DeviceState.unpack(bytes(data))


def test_flags_of_the_future_are_refused() -> None:
    body = STATE.pack()[:12] + (4).to_bytes(4, "little") + STATE.pack()[16:-4]
    with pytest.raises(PeerError, match="flags 0x4"):
        DeviceState.unpack(body + zlib.crc32(body).to_bytes(4, "little"))


@pytest.mark.parametrize(
    ("writeback", "is_drivers", "binding"),
    [(True, False, False), (True, True, True), (False, False, True), (False, True, True)],
)
def test_only_a_cache_that_the_driver_was_told_of_and_flushes_may_become_none(
    writeback: bool, is_drivers: bool, binding: bool
) -> None:
    assert DeviceState(0, writeback, is_drivers).is_binding == binding
