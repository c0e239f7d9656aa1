"""Sectors are encrypted as the library's own modes encrypt them, one by one."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import os
import sys

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from hypothesis import given, settings
from hypothesis import strategies as st

from vhostblk.block.crypto.sector_cipher import CipherSpec, SectorCipher
from vhostblk.block.crypto.threaded import ThreadedCipher
from vhostblk.block.iov import IoVec
from vhostblk.errors import ConfigError

SPECS = [
    CipherSpec(f"aes-{bits}", mode, ivgen, "sha256" if ivgen == "essiv" else None)
    for bits, mode, ivgen in itertools.product(
        (128, 192, 256), ("xts", "cbc", "ctr", "ecb"), ("plain64", "plain", "essiv")
    )
]


def by_the_library(spec: CipherSpec, key: bytes, sector: int, data: bytes) -> bytes:
    """Each sector in a context of its own."""
    iv = sector.to_bytes(16, "little")
    if spec.ivgen == "plain":
        iv = (sector & 0xFFFFFFFF).to_bytes(16, "little")
    elif spec.ivgen == "essiv":
        salt = Cipher(algorithms.AES(hashlib.sha256(key).digest()), modes.ECB()).encryptor()
        iv = salt.update(iv)
    mode: dict[str, modes.XTS | modes.CBC | modes.CTR | modes.ECB] = {
        "xts": modes.XTS(iv),
        "cbc": modes.CBC(iv),
        "ctr": modes.CTR(iv),
        "ecb": modes.ECB(),
    }
    return Cipher(algorithms.AES(key), mode[spec.mode]).encryptor().update(data)


@pytest.mark.parametrize("spec", SPECS, ids=str)
def test_sectors_are_those_of_the_library(spec: CipherSpec) -> None:
    key, data = os.urandom(spec.key_bytes), os.urandom(3 * 512)
    cipher = SectorCipher(spec, key)
    for first in (0, 7, (1 << 32) - 1, 1 << 40):
        found = cipher.encrypt(first, data)
        assert cipher.decrypt(first, found) == data
        if (spec.algorithm, spec.mode) == ("aes-192", "xts"):
            continue  # which OpenSSL has not
        for number in range(3):
            part = slice(number * 512, number * 512 + 512)
            assert found[part] == by_the_library(spec, key, first + number, data[part])


@settings(max_examples=30, deadline=None)
@given(
    spec=st.sampled_from(SPECS),
    sector=st.integers(0, 1 << 54),
    sectors=st.integers(1, 300),
    seed=st.binary(min_size=64, max_size=64),
)
def test_what_was_encrypted_comes_back(
    spec: CipherSpec, sector: int, sectors: int, seed: bytes
) -> None:
    data = (seed * 8) * sectors
    cipher = SectorCipher(spec, seed[: spec.key_bytes])
    found = cipher.encrypt(sector, data)
    assert found != data
    assert cipher.decrypt(sector, found) == data


def test_large_requests_are_the_same_in_pieces_and_leave_the_memory_they_came_from_alone() -> None:
    spec = CipherSpec("aes-256", "xts", "plain64")
    key, data = os.urandom(64), os.urandom(200 * 512)
    whole = SectorCipher(spec, key).encrypt(5, data)

    async def scenario() -> None:
        cipher = ThreadedCipher(spec, key)
        mine = bytearray(data)
        parts = IoVec.of(memoryview(mine)[:700], memoryview(mine)[700:])
        found = await asyncio.gather(*(cipher.encrypt(5, parts) for _ in range(4)))
        assert all(one == whole for one in found)
        assert mine == data
        await cipher.decrypt(5, found[0])
        assert found[0] == data

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        (CipherSpec("serpent-256", "xts", "plain64"), "Algorithm 'serpent-256' not supported"),
        (CipherSpec("3des", "cbc", "plain64"), "Algorithm '3des' not supported"),
        (
            CipherSpec("aes-256", "cbc", "essiv", "sha1"),
            "No AES cipher with key size 20 available",
        ),
        (CipherSpec("aes-256", "cbc", "essiv", "sha3"), "Hash algorithm 'sha3' not supported"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(spec: CipherSpec, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        SectorCipher(spec, bytes(spec.key_bytes))


def test_missing_library_is_named_with_what_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.ciphers", None)
    with pytest.raises(ConfigError, match=r"'cryptography' \(pip install vhostblk\[crypto\]\)"):
        SectorCipher(CipherSpec("aes-256", "xts", "plain64"), bytes(64))
