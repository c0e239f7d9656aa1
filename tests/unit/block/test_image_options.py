"""Lists of options of images: read, told and listed as QEMU's tools do it."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from vhostblk.block.image_options import ImageOptions, describe, known_options, wants_help
from vhostblk.block.options import BOOLEAN, INTEGER, SIZE, STRING, choice, option
from vhostblk.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Format:
    """Options of a format."""

    cluster_size: int = option(SIZE, 65536, name="cluster_size", about="qcow2 cluster size")
    mode: str = option(choice("off", "full"), "off", about="How", tacit=True)
    size: int = option(SIZE, about="Virtual disk size")
    name: str | None = option(STRING, None, about="Name")
    lazy: bool = option(BOOLEAN, False, about="Whether")
    bits: int = option(INTEGER, 16, about="Width")
    hidden: int = option(INTEGER, 1, about="nobody's business", listed=False)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Options of a protocol."""

    size: int = option(SIZE, 0, about="Bytes")
    nocow: bool = option(BOOLEAN, False, about="Turn off", tacit=True)


def options(*types: type) -> ImageOptions:
    return ImageOptions(known_options(*(types or (Format, Protocol))))


def test_defaults_and_what_was_said_are_told_in_the_order_of_the_declarations() -> None:
    said = options()
    assert str(said) == "cluster_size=65536 lazy=off bits=16"
    said.say("nocow=yes,lazy,bits=0x20,mode=full,name=a,,b,cluster_size=2k")
    said.set("size", 1 << 20)
    assert str(said) == (
        "cluster_size=2048 mode=full size=1048576 name=a,,b lazy=on bits=32 nocow=yes"
    )
    assert said.values() == {
        "nocow": True,
        "lazy": True,
        "bits": 32,
        "mode": "full",
        "name": "a,b",
        "cluster_size": 2048,
        "size": 1 << 20,
    }


def test_the_last_of_equal_options_counts_and_an_id_is_none() -> None:
    said = options()
    said.say("size=1M,id=x,size=2M")
    assert (said["size"], said.get("name"), "name" in said, list(said)) == (
        2 << 20,
        None,
        False,
        ["size"],
    )


def test_options_of_programs_may_have_dashes_and_typed_values() -> None:
    said = options()
    said.say({"cluster-size": 512, "lazy": True})
    assert str(said) == "cluster_size=512 lazy=on bits=16"


def test_sizes_beyond_63_bits_are_told_as_c_does_and_are_too_large() -> None:
    said = options()
    said.say("size=9E")
    assert "size=-8070450532247928832" in str(said)
    with pytest.raises(ConfigError, match="too large"):
        said.values()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("what=1", "Invalid parameter 'what'"),
        ("hidden=1", "Invalid parameter 'hidden'"),
        ("size=1M,what", "Invalid parameter 'what'"),
        ("nowhat", "Invalid parameter 'what'"),
        (",size=1", "Invalid parameter ''"),
        ("lazy=1", "Parameter 'lazy' expects 'on' or 'off'"),
        ("bits=x", "Parameter 'bits' expects a number"),
        ("bits=0o7", "Parameter 'bits' expects a number"),
        ("bits=08", "Parameter 'bits' expects a number"),
        ("bits=1_0", "Parameter 'bits' expects a number"),
        ("bits=", "Parameter 'bits' expects a number"),
        (
            "bits=99999999999999999999",
            "Value '99999999999999999999' is too large for parameter 'bits'",
        ),
        ("size=16E", "Value '16E' is out of range for parameter 'size'"),
        ("size=1.5", "Parameter 'size' expects a non-negative number below 2^64"),
    ],
)
def test_first_wrong_option_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        options().say(text)
    assert str(caught.value) == message


def test_hint_about_sizes_is_for_tools() -> None:
    with pytest.raises(ConfigError) as caught:
        options().say("size=x")
    assert caught.value.qemu_text.splitlines()[1:] == [
        "Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-",
        "and exabytes, respectively.",
    ]


@pytest.mark.parametrize("number", ["16", "020", "0x10", "+16", " 16"])
def test_numbers_are_read_as_c_reads_them(number: str) -> None:
    said = options()
    said.say(f"bits={number}")
    assert said["bits"] == 16


def test_negative_numbers_count_from_the_other_end() -> None:
    said = options()
    said.say("bits=-1")
    assert said["bits"] == (1 << 64) - 1
    assert "bits=-1" in str(said)
    assert said.values()["bits"] == (1 << 63) - 1


def test_list_for_people_is_sorted_and_has_a_column() -> None:
    assert describe(known_options(Format, Protocol).values()) == (
        "  bits=<num>             - Width\n"
        "  cluster_size=<size>    - qcow2 cluster size\n"
        "  lazy=<bool (on/off)>   - Whether\n"
        "  mode=<str>             - How\n"
        "  name=<str>             - Name\n"
        "  nocow=<bool (on/off)>  - Turn off\n"
        "  size=<size>            - Virtual disk size\n"
    )


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("help", True),
        ("?", True),
        ("size=1M,help", True),
        ("help,size=1M", True),
        ("a=help", False),
        ("help=on", False),
        ("a,,help", True),
        ("a=b,,help", False),
        ("nohelp", False),
        ("", False),
    ],
)
def test_help_is_asked_for_by_a_word_of_its_own(text: str, wanted: bool) -> None:
    assert wants_help(text) is wanted
