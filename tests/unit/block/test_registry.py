"""Which drivers there are, which are allowed, and which one fits (rows B03 and B04)."""

from __future__ import annotations

import errno
from typing import Any

import pytest

from tests.unit.block.fakes import ArrayNode, NoOptions, PassNode, put_above, run_now
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode
from vhostblk.block.registry import DriverRegistry
from vhostblk.errors import BlockError, ConfigError


def driver(name: str, score: int = 0, protocol: str | None = None, device: int = 0) -> Any:
    class Driver(BlockNode):
        driver_name = name
        options_type = NoOptions
        protocol_name = protocol

        @classmethod
        def probe(cls, header: bytes, filename: str) -> int:
            return score if header.startswith(b"MAGIC") else 0

        @classmethod
        def probe_device(cls, filename: str) -> int:
            return device if filename.startswith("/dev/") else 0

    return Driver


def test_unknown_driver_is_enoent_and_says_which_are_known() -> None:
    with pytest.raises(
        ConfigError, match=r"Unknown driver 'x' for 'file.driver' \(known: blkdebug,"
    ):
        DriverRegistry(DRIVERS).find("x", "file.driver")
    with pytest.raises(ConfigError) as caught:
        DriverRegistry(DRIVERS).find(7)
    assert caught.value.errno == errno.ENOENT


def test_later_registrations_come_first_and_listing_is_sorted() -> None:
    registry = DriverRegistry({"b": driver("b")})
    registry.register(driver("a"))
    registry.register(driver("c"))
    assert list(registry) == ["c", "a", "b"]
    assert registry.names() == ["a", "b", "c"]


def test_forbidden_driver_is_enotsup_with_the_message_that_fits() -> None:
    registry = DriverRegistry(DRIVERS, read_write=["file"], read_only=["raw"])
    registry.check_allowed("file", read_only=False)
    registry.check_allowed("file", read_only=True)
    registry.check_allowed("raw", read_only=True)
    for name, read_only, message in (
        ("raw", False, "Driver 'raw' can only be used for read-only devices"),
        ("null-co", False, "Driver 'null-co' is not whitelisted"),
        ("null-co", True, "Driver 'null-co' is not whitelisted"),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            registry.check_allowed(name, read_only=read_only)
        assert caught.value.errno == errno.ENOTSUP
    assert registry.names(read_only=False) == ["file"]
    assert registry.names(read_only=True) == ["file", "raw"]
    assert registry.has_whitelist
    assert not DriverRegistry(DRIVERS).has_whitelist


def test_highest_score_wins_and_of_equals_the_first() -> None:
    weak, strong, equal = driver("weak", 10), driver("strong", 100), driver("equal", 100)
    for order in ((weak, strong, equal), (strong, weak, equal), (strong, equal, weak)):
        registry = DriverRegistry({entry.driver_name: entry for entry in order})
        assert registry.probe(b"MAGIC", "") is strong
        assert registry.probe(b"MAG", "") is None
    assert DriverRegistry(DRIVERS).probe(b"", "") is DRIVERS["raw"]


def test_devices_beat_prefixes_and_paths_are_files() -> None:
    registry = DriverRegistry(
        {"dev": driver("dev", device=5), "net": driver("net", protocol="net"), **DRIVERS}
    )
    for name, expected in (
        ("/dev/disk/by-path/pci-0000:00:01", "dev"),
        ("net:host/x", "net"),
        ("/srv/net:x", "file"),
        ("disk.img", "file"),
        ("file:disk.img", "file"),
        ("null-co://", "null-co"),
    ):
        assert registry.protocol_of(name).driver_name == expected
    assert registry.protocol_of("net:x", allow_prefix=False).driver_name == "file"
    with pytest.raises(ConfigError, match="Unknown protocol 'gopher'") as caught:
        registry.protocol_of("gopher://x")
    assert caught.value.errno == errno.ENOENT


def test_filter_forwards_what_it_leaves_out_and_anybody_else_fails_with_enotsup() -> None:
    below = ArrayNode()
    above = put_above(below)
    run_now(above.driver_pwritev(0, 512, IoVec([memoryview(b"x" * 512)]), 0))
    run_now(above.driver_pwrite_zeroes(512, 512, 0))
    run_now(above.driver_pdiscard(1024, 512))
    assert [call[0] for call in below.asked.calls] == ["write", "zero", "discard"]

    class Silent(PassNode):
        is_filter = False

    silent = Silent("s", below.common, NoOptions())
    with pytest.raises(BlockError) as caught:
        run_now(silent.driver_pdiscard(0, 512))
    assert caught.value.errno == errno.ENOTSUP
