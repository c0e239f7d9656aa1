"""Cache, discard and read-only modes, and what children inherit of them (row B06)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from tests.unit.block.fakes import ArrayNode, NoOptions
from vhostblk.block.drivers import DRIVERS
from vhostblk.block.flags import OpenFlag
from vhostblk.block.graph import BlockGraph
from vhostblk.block.modes import (
    inherited_modes,
    open_flags,
    parse_aio_mode,
    parse_cache_mode,
    parse_discard_mode,
)
from vhostblk.block.node import BlockNode, OpenContext
from vhostblk.block.options import NodeOptions, consume
from vhostblk.block.roles import Role
from vhostblk.errors import ConfigError


@pytest.mark.parametrize(
    ("name", "direct", "no_flush", "writethrough"),
    [
        ("none", True, False, False),
        ("off", True, False, False),
        ("directsync", True, False, True),
        ("writeback", False, False, False),
        ("unsafe", False, True, False),
        ("writethrough", False, False, True),
    ],
)
def test_six_cache_modes(name: str, direct: bool, no_flush: bool, writethrough: bool) -> None:
    mode = parse_cache_mode(name)
    assert (mode.direct, mode.no_flush, mode.writethrough) == (direct, no_flush, writethrough)
    common = consume(NodeOptions, mode.options)
    assert (common.cache_direct, common.cache_no_flush) == (direct, no_flush)


def test_seventh_cache_mode_is_refused() -> None:
    with pytest.raises(ConfigError, match="Invalid cache option: fast"):
        parse_cache_mode("fast")


@pytest.mark.parametrize(
    ("parse", "words"),
    [
        (
            parse_discard_mode,
            {
                "ignore": OpenFlag(0),
                "off": OpenFlag(0),
                "unmap": OpenFlag.UNMAP,
                "on": OpenFlag.UNMAP,
            },
        ),
        (
            parse_aio_mode,
            {
                "threads": OpenFlag(0),
                "native": OpenFlag.NATIVE_AIO,
                "io_uring": OpenFlag.IO_URING,
            },
        ),
    ],
)
def test_words_of_discard_and_aio(
    parse: Callable[[str], OpenFlag], words: dict[str, OpenFlag]
) -> None:
    assert {word: parse(word) for word in words} == words
    for wrong in ("", "true", "ON", "posix"):
        with pytest.raises(ConfigError, match=f"option: {wrong}$"):
            parse(wrong)


class Overlay(BlockNode):
    """As a format with a file and a backing file."""

    driver_name = "overlay"
    options_type = NoOptions
    child_keys = ("file", "backing")

    async def open(self, context: OpenContext) -> None:
        await context.open_child(self, "file", Role.IMAGE)
        await context.open_optional_child(self, "backing", Role.COW)
        self.length = 512


def opened(options: dict[str, Any]) -> dict[str, OpenFlag]:
    async def run() -> dict[str, OpenFlag]:
        graph = BlockGraph({**DRIVERS, "overlay": Overlay, "array": ArrayNode})
        node = await graph.add(options)
        flags = {name: open_flags(edge.node) for name, edge in node.children.items()}
        flags[""] = open_flags(node)
        await graph.close_all()
        return flags

    return asyncio.run(run())


RDWR = OpenFlag.RDWR | OpenFlag.ALLOW_RDWR


def test_flags_of_a_parent_its_file_and_its_backing_file() -> None:
    null = {"driver": "null-co"}
    assert opened(
        {
            "driver": "overlay",
            "cache": {"direct": True, "no-flush": True},
            "file": null,
            "backing": {"driver": "raw", "file": null},
        }
    ) == {
        "": RDWR | OpenFlag.NOCACHE | OpenFlag.NO_FLUSH,
        "file": RDWR | OpenFlag.PROTOCOL | OpenFlag.NOCACHE | OpenFlag.NO_FLUSH | OpenFlag.UNMAP,
        "backing": OpenFlag.NOCACHE | OpenFlag.NO_FLUSH | OpenFlag.UNMAP,
    }


def test_what_a_child_says_itself_wins() -> None:
    flags = opened(
        {
            "driver": "overlay",
            "cache.direct": True,
            "discard": "unmap",
            "file": {"driver": "null-co", "discard": "ignore", "cache.direct": "off"},
            "backing": {"driver": "null-co", "read-only": "off"},
        }
    )
    assert flags["file"] == RDWR | OpenFlag.PROTOCOL
    assert flags["backing"] & OpenFlag.RDWR


def test_read_only_and_auto_read_only_go_to_the_file_but_not_to_the_backing_file() -> None:
    parent = NodeOptions(read_only=False, auto_read_only=True)
    for role, expected in ((Role.IMAGE, (False, True)), (Role.COW, (True, False))):
        modes = inherited_modes(parent, role, {})
        assert (modes["read-only"], modes["auto-read-only"]) == expected


def test_force_share_is_inherited_only_by_who_stays_read_only() -> None:
    parent = NodeOptions(read_only=True, force_share=True)
    assert inherited_modes(parent, Role.IMAGE, {})["force-share"]
    assert "force-share" not in inherited_modes(parent, Role.IMAGE, {"read-only": "off"})


def test_detect_zeroes_unmap_needs_discard_unmap() -> None:
    with pytest.raises(ConfigError, match="'detect-zeroes=unmap' can only be used with 'discard="):
        NodeOptions(detect_zeroes="unmap")


def test_force_share_needs_read_only() -> None:
    with pytest.raises(ConfigError, match="'force-share=on' can only be used with 'read-only=on'"):
        NodeOptions(force_share=True)
