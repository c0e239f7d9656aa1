"""What the table of drivers says of drivers that have not been imported is what they say themselves."""

from __future__ import annotations

import pytest

from vhostblk.block.driver import Driver
from vhostblk.block.driver_table import DriverPlace, DriverTable
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.registry import DriverRegistry

HEADER = 512


@pytest.mark.parametrize("name", DRIVERS)
def test_place_says_what_the_driver_says(name: str) -> None:
    place, driver = DRIVERS.places[name], DRIVERS[name]
    assert driver.driver_name == name
    assert place.protocol == driver.protocol_name
    assert place.more_protocols == driver.more_protocol_names
    looks_at_names = driver.probe_device.__func__ is not Driver.probe_device.__func__  # type: ignore[attr-defined]
    assert place.devices == looks_at_names
    looks_at_content = driver.probe.__func__ is not Driver.probe.__func__  # type: ignore[attr-defined]
    assert bool(place.signatures) == looks_at_content


@pytest.mark.parametrize("name", [name for name in DRIVERS if DRIVERS.places[name].signatures])
def test_driver_recognises_nothing_without_its_signature(name: str) -> None:
    place, driver = DRIVERS.places[name], DRIVERS[name]
    for at, text in place.signatures:
        header = bytearray(HEADER)
        header[at : at + len(text)] = text
        assert place.may_begin(bytes(header))
    for header in (bytearray(HEADER), bytearray(b"\xff" * HEADER), bytearray()):
        assert place.may_begin(bytes(header)) or driver.probe(bytes(header), "") == 0


def test_only_a_driver_that_is_looked_up_is_imported() -> None:
    table = DriverTable(
        {
            "here": DriverPlace("vhostblk.block.drivers.null", "NullNode", protocol="here"),
            "nowhere": DriverPlace(
                "vhostblk.no_such_module", "X", protocol="x", signatures=((4, b"magic"),)
            ),
        }
    )
    assert "nowhere" in table
    assert list(table) == ["here", "nowhere"]
    registry = DriverRegistry(table)
    assert registry.names() == ["here", "nowhere"]
    assert registry.find("here") is DRIVERS["null-co"]
    assert registry.probe(b"1234manic", "") is None
    with pytest.raises(ModuleNotFoundError):
        registry.probe(b"1234magic", "")
    with pytest.raises(ModuleNotFoundError):
        registry.protocol_of("x:y")
