"""Secrets are read as QEMU reads them, refused in its words, and shown to nobody."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from vhostblk.block.crypto.secret import SecretConfig, Secrets
from vhostblk.errors import ConfigError

KEY = bytes(range(32))
IV = bytes(range(100, 116))


def read(**options: Any) -> bytes:
    secrets = Secrets()
    secrets.add(SecretConfig("key", base64.b64encode(KEY).decode(), format="base64"))
    secrets.add(SecretConfig("s", **options))
    return secrets.content("s")


def encrypted(content: bytes) -> str:
    """As `openssl enc -aes-256-cbc -a` makes it."""
    padding = 16 - len(content) % 16
    cipher = Cipher(algorithms.AES(KEY), modes.CBC(IV)).encryptor()
    return base64.b64encode(cipher.update(content + bytes([padding]) * padding)).decode()


def test_secret_is_what_was_said(tmp_path: Path) -> None:
    (tmp_path / "password").write_bytes(b"from a file\n")
    assert read(data="hunter2") == b"hunter2"
    assert read(file=str(tmp_path / "password")) == b"from a file\n"
    assert read(data="aHVu\ndGVyMg==\n", format="base64") == b"hunter2"
    assert read(data="aHVudGVyMg", format="base64") == b"hunter"  # what is left over does not count
    assert read(data=os.fsdecode(b"\xff")) == b"\xff"


def test_encrypted_secret_is_decrypted() -> None:
    iv = base64.b64encode(IV).decode()
    text = encrypted(b"a longer secret than a block")
    found = read(data=text, format="base64", keyid="key", iv=iv)
    assert found == b"a longer secret than a block"


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "Either 'file' or 'data' must be provided"),
        ({"data": "a", "file": "b"}, "'file' and 'data' are mutually exclusive"),
        ({"data": "%%", "format": "base64"}, "Base64 data contains invalid characters"),
        ({"data": "a", "keyid": "nosuch"}, "No secret with id 'nosuch'"),
        ({"data": "a", "keyid": "key"}, "IV is required to decrypt secret"),
        ({"data": "a", "keyid": "key", "iv": "YWJj"}, "IV should be 16 bytes in length not 3"),
        (
            {"data": "abc", "keyid": "key", "iv": base64.b64encode(IV).decode()},
            "Length 3 must be a multiple of block size 16, and not 0",
        ),
    ],
)
def test_secret_that_cannot_be_had_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read(**options)
    assert refused.value.qemu_text == complaint


def test_key_of_another_length_is_refused() -> None:
    secrets = Secrets()
    secrets.add(SecretConfig("key", "short"))
    with pytest.raises(ConfigError, match="Key should be 32 bytes in length"):
        secrets.add(SecretConfig("s", "abc", keyid="key"))


def test_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing: No such file"):
        read(file=str(tmp_path / "nothing"))
    with pytest.raises(ConfigError, match="Is a directory"):
        read(file=str(tmp_path))
    with pytest.raises(ConfigError, match="larger than"):
        read(file="/dev/zero")


@pytest.mark.parametrize("content", [b"\xff", b"a\0b", b"\xed\xa0\x80"])
def test_password_is_text(content: bytes) -> None:
    secrets = Secrets()
    secrets.add(SecretConfig("s", base64.b64encode(content).decode(), format="base64"))
    assert secrets.content("s") == content
    with pytest.raises(ConfigError, match="Data from secret s is not valid UTF-8"):
        secrets.password("s")


def test_secret_is_not_shown() -> None:
    config = SecretConfig("s", "hunter2")
    secrets = Secrets()
    secrets.add(config)
    assert "hunter2" not in f"{config} {config!r} {secrets} {secrets!r} {list(secrets)}"
