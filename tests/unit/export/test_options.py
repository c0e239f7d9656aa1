"""The options of an export: QEMU's words in, a configuration out. Wrong ones are in tests/unit/cli."""

from __future__ import annotations

from typing import Any

import pytest

from vhostblk.block.keyval import parse_options
from vhostblk.errors import ConfigError
from vhostblk.export.options import ExportConfig, parse_export

UNIX = "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=/s"


def parse(text: str) -> ExportConfig:
    return parse_export(parse_options(text, "type"))


def test_defaults_are_qemus_where_it_has_some() -> None:
    config = parse(UNIX)
    assert config == ExportConfig(
        id="e", node_name="d", socket_path="/s", writable=False, write_cache=True, max_segments=1
    )
    assert config.num_queues == 64
    assert config.logical_block_size is None
    assert (config.io_threads, config.own_threads) == ((), 1)


@pytest.mark.parametrize(
    ("text", "field", "value"),
    [
        ("writable=on", "writable", True),
        ("writethrough=on", "write_cache", False),
        ("num-queues=1", "num_queues", 1),
        ("num-queues=256", "num_queues", 256),
        ("logical-block-size=512", "logical_block_size", 512),
        ("logical-block-size=64k", "logical_block_size", 65536),
        ("iothread=io0", "io_threads", ("io0",)),
        ("fixed-iothread=on", "own_threads", 1),
        ("max-segments=64", "max_segments", 64),
        ("serial=a,,b", "serial", "a,b"),
        ("serial=", "serial", ""),
    ],
)
def test_each_option(text: str, field: str, value: Any) -> None:
    assert getattr(parse(f"{UNIX},{text}"), field) == value


@pytest.mark.parametrize(("text", "fd"), [("0", 0), ("3", 3), ("007", 7)])
def test_fd_is_a_number(text: str, fd: int) -> None:
    config = parse(f"vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str={text}")
    assert (config.fd, config.socket_path) == (fd, None)


@pytest.mark.parametrize("name", ["e", "Disk-0", "a.b_c-d", "x" * 200])
def test_identifiers(name: str) -> None:
    assert parse(f"{UNIX},id={name}").id == name


@pytest.mark.parametrize("name", ["", "0", "-a", "_a", ".a", "a b", "a/b", "é", "a\n"])
def test_what_is_no_identifier(name: str) -> None:
    with pytest.raises(ConfigError, match="'id' expects an identifier"):
        parse(f"{UNIX},id={name}")


def test_options_of_the_caller_are_left_alone() -> None:
    options = {"type": "vhost-user-blk", "id": "e", "node-name": "d"}
    nested = options | {"addr": {"type": "unix", "path": "/s"}}
    dotted = options | {"addr.type": "unix", "addr.path": "/s"}
    assert parse_export(nested) == parse_export(dotted) == parse(UNIX)
    assert nested["addr"] == {"type": "unix", "path": "/s"}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_queues", 0),
        ("num_queues", 257),
        ("max_segments", 0),
        ("max_segments", 65),
        ("own_threads", 0),
        ("logical_block_size", 256),
        ("logical_block_size", 1000),
        ("logical_block_size", 131072),
    ],
)
def test_configuration_made_in_python_is_checked_too(field: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"={value}: "):
        ExportConfig(id="e", node_name="d", **{field: value})
