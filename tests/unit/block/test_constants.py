"""Names and numbers that the field's documentation speaks of (row B02)."""

from __future__ import annotations

from vhostblk.block.flags import CheckMode, OpenFlag, StatusFlag
from vhostblk.block.limits import MAX_ALIGNMENT, MAX_LENGTH, MAX_REQUEST, MAX_ZEROES_BOUNCE
from vhostblk.block.node import Req
from vhostblk.block.permissions import Perm
from vhostblk.block.registry import PROBE_SIZE
from vhostblk.block.roles import Role
from vhostblk.block.tracking import RequestType


def test_request_flags() -> None:
    assert {flag.name: flag.value for flag in Req} == {
        "COPY_ON_READ": 0x001,
        "ZERO_WRITE": 0x002,
        "MAY_UNMAP": 0x004,
        "REGISTERED_BUF": 0x008,
        "FUA": 0x010,
        "WRITE_COMPRESSED": 0x020,
        "WRITE_UNCHANGED": 0x040,
        "SERIALISING": 0x080,
        "NO_FALLBACK": 0x100,
        "PREFETCH": 0x200,
        "NO_WAIT": 0x400,
    }
    assert Req.MASK.value == 0x7FF


def test_open_flags() -> None:
    assert {flag.name: flag.value for flag in OpenFlag} == {
        "NO_SHARE": 0x0001,
        "RDWR": 0x0002,
        "RESIZE": 0x0004,
        "SNAPSHOT": 0x0008,
        "TEMPORARY": 0x0010,
        "NOCACHE": 0x0020,
        "NATIVE_AIO": 0x0080,
        "NO_BACKING": 0x0100,
        "NO_FLUSH": 0x0200,
        "COPY_ON_READ": 0x0400,
        "INACTIVE": 0x0800,
        "CHECK": 0x1000,
        "ALLOW_RDWR": 0x2000,
        "UNMAP": 0x4000,
        "PROTOCOL": 0x8000,
        "NO_IO": 0x10000,
        "AUTO_RDONLY": 0x20000,
        "IO_URING": 0x40000,
        "CBW_DISCARD_SOURCE": 0x80000,
    }
    assert OpenFlag.CACHE_MASK.value == 0x0220


def test_permissions_roles_requests_and_checks() -> None:
    assert {perm.name: perm.value for perm in Perm} == {
        "CONSISTENT_READ": 1,
        "WRITE": 2,
        "WRITE_UNCHANGED": 4,
        "RESIZE": 8,
    }
    assert Perm.ALL.value == 0x0F
    assert {role.name: role.value for role in Role} == {
        "DATA": 1,
        "METADATA": 2,
        "FILTERED": 4,
        "COW": 8,
        "PRIMARY": 16,
    }
    assert Role.IMAGE.value == 19
    assert {"READ", "WRITE", "DISCARD", "TRUNCATE"} <= set(RequestType.__members__)
    assert (CheckMode.FIX_LEAKS, CheckMode.FIX_ERRORS) == (1, 2)


def test_status_bits() -> None:
    assert {flag.name: flag.value for flag in StatusFlag} == {
        "DATA": 0x01,
        "ZERO": 0x02,
        "OFFSET_VALID": 0x04,
        "RAW": 0x08,
        "ALLOCATED": 0x10,
        "EOF": 0x20,
        "RECURSE": 0x40,
        "COMPRESSED": 0x80,
    }


def test_sizes() -> None:
    assert MAX_REQUEST == 4_194_303 * 512 == 2_147_483_136
    assert MAX_ALIGNMENT == 1 << 30
    assert MAX_LENGTH == 0x7FFFFFFFC0000000 == ((1 << 63) - 1) // MAX_ALIGNMENT * MAX_ALIGNMENT
    assert MAX_ZEROES_BOUNCE == 32768 * 512
    assert PROBE_SIZE == 512
