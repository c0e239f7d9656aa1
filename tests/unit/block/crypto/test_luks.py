"""LUKS volumes in memory: what is made can be opened, passwords come and go, nothing half done costs another one."""

from __future__ import annotations

import asyncio
import itertools
import struct
from collections.abc import Coroutine
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostblk.block.crypto.af_split import merge, split
from vhostblk.block.crypto.luks import (
    LuksParameters,
    add_key,
    erase_key,
    format_volume,
    load_header,
    unlock,
)
from vhostblk.block.crypto.luks_amend import KeyChange, change_keys
from vhostblk.block.crypto.luks_header import HEADER_BYTES, LuksHeader
from vhostblk.block.crypto.secret import SecretConfig, Secrets
from vhostblk.block.crypto.sector_cipher import CipherSpec
from vhostblk.errors import ConfigError, ImageError

FAST = LuksParameters(iter_time=1)


class Memory:
    """A header area that knows every write."""

    def __init__(self) -> None:
        self.data = bytearray(FAST.payload_bytes)
        self.writes: list[tuple[int, bytes] | None] = []  # None: a flush

    async def read(self, offset: int, length: int) -> bytes:
        return bytes(self.data[offset : offset + length])

    async def write(self, offset: int, data: bytes) -> None:
        self.writes.append((offset, data))
        self.data[offset : offset + len(data)] = data

    async def flush(self) -> None:
        self.writes.append(None)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(work)


def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody has to find out how fast this machine is."""
    monkeypatch.setattr("vhostblk.block.crypto.luks._ENOUGH", 0)


@pytest.fixture
def volume(monkeypatch: pytest.MonkeyPatch) -> tuple[Memory, LuksHeader, bytes]:
    fast(monkeypatch)
    area = Memory()
    header, key = run(format_volume(area, FAST, b"first"))
    return area, header, key


@settings(max_examples=25, deadline=None)
@given(
    key=st.binary(min_size=8, max_size=64),  # so long that no digest hides the damage by chance
    stripes=st.integers(2, 40),
    name=st.sampled_from(["sha1", "sha256", "sha512"]),
)
def test_split_key_comes_back_and_needs_every_byte(key: bytes, stripes: int, name: str) -> None:
    material = split(key, stripes, name)
    assert len(material) == len(key) * stripes
    assert merge(material, stripes, name) == key
    damaged = bytearray(material)
    damaged[len(material) // 2] ^= 1
    assert merge(bytes(damaged), stripes, name) != key


def test_new_volume_is_opened_by_its_password_alone(
    volume: tuple[Memory, LuksHeader, bytes],
) -> None:
    area, header, key = volume
    found = run(load_header(area))
    assert found == header
    assert found.to_bytes() == bytes(area.data[:HEADER_BYTES])
    assert run(unlock(area, found, b"first")) == key
    assert key not in area.data
    with pytest.raises(ConfigError, match="Invalid password, cannot unlock any keyslot"):
        run(unlock(area, found, b"First"))


def test_passwords_come_and_go(volume: tuple[Memory, LuksHeader, bytes]) -> None:
    area, header, key = volume
    header = run(add_key(area, header, 6, b"second", key, 1))
    assert header.active_slots == [0, 6]
    for password in (b"first", b"second"):
        assert run(unlock(area, run(load_header(area)), password)) == key
    material = bytes(area.data[header.slots[0].offset :][: header.material_bytes])
    header = run(erase_key(area, header, 0))
    assert material[:4096] not in area.data
    with pytest.raises(ConfigError, match="Invalid password"):
        run(unlock(area, header, b"first"))
    assert run(unlock(area, run(load_header(area)), b"second")) == key


@pytest.mark.parametrize("slot", [1, 6, 7])
def test_crash_while_a_password_is_added_costs_no_other_one(
    volume: tuple[Memory, LuksHeader, bytes], slot: int
) -> None:
    area, header, key = volume
    before = bytes(area.data)
    area.writes.clear()
    run(add_key(area, header, slot, b"second", key, 1))
    writes = [write for write in area.writes if write is not None]
    for done, (offset, data) in enumerate(writes):
        state = Memory()
        state.data[:] = before
        for at, earlier in writes[:done]:
            state.data[at : at + len(earlier)] = earlier
        for torn in (data[:512], b""):  # the first sector only, or nothing
            state.data[offset : offset + len(torn)] = torn
            found = run(load_header(state))
            assert run(unlock(state, found, b"first")) == key


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"state": "active"}, "'new-secret' is required to activate a keyslot"),
        ({"state": "active", "new_secret": "x"}, "No secret with id 'x'"),
        ({"state": "active", "new_secret": "b", "keyslot": 8}, "Invalid keyslot 8 specified"),
        ({"state": "active", "new_secret": "b", "old_secret": "a"}, "'old-secret' must not be"),
        ({"state": "active", "new_secret": "b", "keyslot": 0}, "Refusing to overwrite active"),
        ({"state": "inactive"}, "To erase keyslot"),
        ({"state": "inactive", "new_secret": "b"}, "'new-secret' must not be given"),
        ({"state": "inactive", "iter_time": 1}, "'iter-time' must not be given"),
        ({"state": "inactive", "keyslot": 1}, "Given keyslot 1 is already erased"),
        ({"state": "inactive", "keyslot": 0}, "Attempt to erase the only active keyslot 0"),
        ({"state": "inactive", "keyslot": 0, "old_secret": "b"}, "doesn't contain the given old"),
        ({"state": "inactive", "old_secret": "a"}, "All the active keyslots match"),
        ({"state": "inactive", "old_secret": "b"}, "No keyslots match given"),
    ],
)
def test_change_of_keys_that_cannot_be_changes_nothing(
    volume: tuple[Memory, LuksHeader, bytes], change: dict[str, Any], complaint: str
) -> None:
    area, _, _ = volume
    secrets = Secrets()
    secrets.add(SecretConfig("a", "first"))
    secrets.add(SecretConfig("b", "second"))
    before = bytes(area.data)
    with pytest.raises(ConfigError) as refused:
        run(change_keys(area, secrets, "a", KeyChange(**change), force=False))
    assert complaint in str(refused.value)
    assert area.data == before


def test_last_password_is_erased_by_force(volume: tuple[Memory, LuksHeader, bytes]) -> None:
    area, _, _ = volume
    change = KeyChange(state="inactive", keyslot=0)
    header = run(change_keys(area, Secrets(), "", change, force=True))
    assert header.active_slots == []


@pytest.mark.parametrize(
    "spec",
    [
        CipherSpec("aes-128", "cbc", "essiv", "sha256"),
        CipherSpec("aes-192", "xts", "plain"),
        CipherSpec("aes-256", "ctr", "plain64", "sha1"),
    ],
    ids=str,
)
@pytest.mark.parametrize("hash_name", ["sha1", "sha512"])
def test_other_ciphers_and_hashes(
    monkeypatch: pytest.MonkeyPatch, spec: CipherSpec, hash_name: str
) -> None:
    fast(monkeypatch)
    area = Memory()
    parameters = LuksParameters(spec=spec, hash=hash_name, iter_time=1)
    header, key = run(format_volume(area, parameters, "Größe".encode()))
    assert run(load_header(area)) == header
    assert header.spec == spec
    assert run(unlock(area, header, "Größe".encode())) == key


def test_time_that_no_header_can_say_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    fast(monkeypatch)
    parameters = LuksParameters(iter_time=1 << 50)
    with pytest.raises(ConfigError, match=r"PBKDF iterations \d+ larger than 4294967295"):
        run(format_volume(Memory(), parameters, b"first"))


# Where fields are: LUKS On-Disk Format 1.2.3, figures 1 and 2.
_SLOT = 208
DAMAGE = {
    "magic": (0, b"LUXS", "Volume is not in LUKS format"),
    "version": (6, struct.pack(">H", 2), "LUKS version 2 is not supported"),
    "cipher name": (8, b"x" * 32, "LUKS header cipher name is not NUL terminated"),
    "cipher": (8, b"abc\0", "Algorithm 'abc' with key size 32 bytes not supported"),
    "mode": (40, b"gcm-plain64\0", "Cipher mode 'gcm' not supported"),
    "mode alone": (40, b"xts\0", "Unexpected cipher mode string format 'xts'"),
    "generator": (40, b"xts-random\0", "IV generator 'random' not supported"),
    "essiv": (40, b"cbc-essiv\0", "Algorithm 'aes' with key size 64 bytes not supported"),
    "essiv's hash": (40, b"xts-essiv\0", "Missing IV generator hash specification"),
    "generator's hash": (40, b"xts-essiv:sha9\0", "Hash algorithm 'sha9' not supported"),
    "hash": (72, b"sha9\0", "Hash algorithm 'sha9' not supported"),
    "payload": (104, struct.pack(">I", 7), "LUKS payload is overlapping with the header"),
    "payload in keys": (104, struct.pack(">I", 600), "Keyslot 1 is overlapping with the encrypted"),
    "odd key": (108, struct.pack(">I", 63), "with key size 31 bytes not supported"),
    "key of nothing": (108, bytes(4), "with key size 0 bytes not supported"),
    "huge key": (108, b"\xff" * 4, "Keyslot 0 is overlapping with the encrypted payload"),
    "iterations": (164, bytes(4), "LUKS key iteration count is zero"),
    "state": (_SLOT, bytes(4), "Keyslot 0 state (active/disable) is corrupted"),
    "slot's iterations": (_SLOT + 4, bytes(4), "Keyslot 0 iteration count is zero"),
    "slot in header": (_SLOT + 40, struct.pack(">I", 7), "Keyslot 0 is overlapping with the LUKS"),
    "slots": (_SLOT + 40, struct.pack(">I", 513), "Keyslots 0 and 1 are overlapping"),
    "stripes": (_SLOT + 44, struct.pack(">I", 3999), "(stripes 3999 != 4000)"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_header_is_refused_in_words(
    volume: tuple[Memory, LuksHeader, bytes], what: str
) -> None:
    area, _, _ = volume
    offset, data, complaint = DAMAGE[what]
    area.data[offset : offset + len(data)] = data
    with pytest.raises(ImageError) as refused:
        run(load_header(area))
    assert complaint in str(refused.value)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, HEADER_BYTES - 1), st.integers(0, 255)), min_size=1, max_size=6
    )
)
def test_any_header_is_read_or_refused(changes: list[tuple[int, int]]) -> None:
    data = bytearray(_header())
    for offset, value in changes:
        data[offset] = value
    try:
        header = LuksHeader.parse(bytes(data))
    except ImageError:
        return
    header.facts()
    for one, other in itertools.combinations(header.slots, 2):
        assert abs(one.sector - other.sector) * 512 >= header.material_bytes
    assert all(
        slot.offset + header.material_bytes <= header.payload_offset for slot in header.slots
    )


@lru_cache(maxsize=1)
def _header() -> bytes:
    with pytest.MonkeyPatch.context() as patch:
        fast(patch)
        area = Memory()
        run(format_volume(area, FAST, b"first"))
    return bytes(area.data[:HEADER_BYTES])
