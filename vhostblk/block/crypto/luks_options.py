"""What users say of LUKS volumes: types of options, and what becomes of their values (QAPI's `QCryptoBlock*Options`).

Drivers have options of these types, under names of their own.
"""

from __future__ import annotations

from vhostblk.block.crypto import luks, luks_amend
from vhostblk.block.crypto.sector_cipher import ALGORITHMS, HASHES, IVGENS, MODES, CipherSpec
from vhostblk.block.options import word
from vhostblk.errors import ConfigError

CIPHER_ALG = word(*ALGORITHMS, said="cipher-alg")
CIPHER_MODE = word(*MODES, said="cipher-mode")
IVGEN_ALG = word(*IVGENS, said="ivgen-alg")
IVGEN_HASH_ALG = word(*HASHES, said="ivgen-hash-alg")
HASH_ALG = word(*HASHES, said="hash-alg")

# In QEMU's words, because image tools tell them.
ABOUT_CIPHER_ALG = "Name of encryption cipher algorithm"
ABOUT_CIPHER_MODE = "Name of encryption cipher mode"
ABOUT_IVGEN_ALG = "Name of IV generator algorithm"
ABOUT_IVGEN_HASH_ALG = "Name of IV generator hash algorithm"
ABOUT_HASH_ALG = "Name of encryption hash algorithm"
ABOUT_ITER_TIME = "Time to spend in PBKDF in milliseconds"
ABOUT_STATE = "Select new state of affected keyslots (active/inactive)"
ABOUT_KEYSLOT = "Select a single keyslot to modify explicitly"
ABOUT_OLD_SECRET = "Select all keyslots that match this password"
ABOUT_NEW_SECRET = "New secret to set in the matching keyslots. Empty string to erase"


def key_change(
    *,
    state: str | None,
    keyslot: int | None,
    old_secret: str | None,
    new_secret: str | None,
    iter_time: int | None,
) -> luks_amend.KeyChange:
    """What becomes of which slots.

    Raises:
        ConfigError: nobody has said what.
    """
    if state is None:
        raise ConfigError("Parameter 'state' is missing")
    if state not in ("active", "inactive"):
        raise ConfigError(f"Parameter 'state' does not accept value '{state}'")
    return luks_amend.KeyChange(
        state=state,
        keyslot=keyslot,
        old_secret=old_secret,
        new_secret=new_secret,
        iter_time=iter_time,
    )


def luks_parameters(
    *,
    cipher_alg: str | None,
    cipher_mode: str | None,
    ivgen_alg: str | None,
    ivgen_hash_alg: str | None,
    hash_alg: str | None,
    iter_time: int | None,
) -> luks.LuksParameters:
    """What a new volume is like, if what is None is as QEMU has it."""
    if ivgen_alg == "essiv" and ivgen_hash_alg is None:
        ivgen_hash_alg = "sha256"
    return luks.LuksParameters(
        spec=CipherSpec(
            cipher_alg or "aes-256", cipher_mode or "xts", ivgen_alg or "plain64", ivgen_hash_alg
        ),
        hash=hash_alg or "sha256",
        iter_time=luks.DEFAULT_ITER_TIME if iter_time is None else iter_time,
    )
