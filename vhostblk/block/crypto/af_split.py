"""The anti-forensic splitter of LUKS: a key becomes so much data that all of it has to survive (LUKS On-Disk Format
1.2.3, "Anti-forensic information splitting").

Bytes in, bytes out. Each stripe but the last is random; the last one makes their sum, which is diffused after each, the
key. Who overwrites any part has destroyed the key.
"""

from __future__ import annotations

import hashlib
import os


def split(key: bytes, stripes: int, hash_name: str) -> bytes:
    """A key as so many stripes, each as long as the key."""
    size = len(key)
    material = os.urandom(size * (stripes - 1))
    total = _sum(material, size, stripes - 1, hash_name)
    return material + (total ^ int.from_bytes(key)).to_bytes(size)


def merge(material: bytes, stripes: int, hash_name: str) -> bytes:
    """The key that was split."""
    size = len(material) // stripes
    total = _sum(material, size, stripes - 1, hash_name)
    return (total ^ int.from_bytes(material[size * (stripes - 1) :])).to_bytes(size)


def _sum(material: bytes, size: int, stripes: int, hash_name: str) -> int:
    """Of all stripes but the last."""
    total = 0
    for at in range(0, stripes * size, size):
        total ^= int.from_bytes(material[at : at + size])
        total = int.from_bytes(_diffuse(total.to_bytes(size), hash_name))
    return total


def _diffuse(block: bytes, hash_name: str) -> bytes:
    """Each byte of it makes a difference to many: parts as long as a hash become their hashes."""
    make = hashlib.new(hash_name).copy
    length = make().digest_size
    found = []
    for number, at in enumerate(range(0, len(block), length)):
        part = block[at : at + length]
        one = make()
        one.update(number.to_bytes(4) + part)
        found.append(one.digest()[: len(part)])
    return b"".join(found)
