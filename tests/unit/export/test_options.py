"""The options of an export: QEMU's words in, a configuration out. Wrong ones are in tests/unit/cli."""

from __future__ import annotations

import re
from typing import Any

import pytest

from vhostblk.block.keyval import parse_options
from vhostblk.errors import ConfigError
from vhostblk.export.options import ExportConfig, parse_export
from vhostblk.vhost.access import PeerRule, SocketAccess

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
        ("iothread-vq-mapping.0.iothread=a", "io_threads", ("a",)),
        ("iothread-vq-mapping.0.iothread=a", "queue_threads", ()),
        ("fixed-iothread=on", "own_threads", 1),
        ("max-segments=64", "max_segments", 64),
        ("serial=a,,b", "serial", "a,b"),
        ("serial=", "serial", ""),
        ("addr.mode=0660", "socket_access", SocketAccess(mode=0o660)),
        ("addr.mode=660,addr.owner=root", "socket_access", SocketAccess(0o660, uid=0)),
        ("addr.owner=7:8", "socket_access", SocketAccess(uid=7, gid=8)),
        ("addr.owner=7,addr.group=root", "socket_access", SocketAccess(uid=7, gid=0)),
        ("serial=", "peers", None),
        ("allow-user.0=root,allow-user.1=8", "peers", PeerRule({0, 8})),
        ("allow-group.0=9", "peers", PeerRule(gids={9})),
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


MAPPED = {"type": "vhost-user-blk", "id": "e", "node-name": "d", "num-queues": 3}


def mapped(*items: object) -> ExportConfig:
    addr = {"type": "unix", "path": "/s"}
    return parse_export(MAPPED | {"addr": addr, "iothread-vq-mapping": list(items)})


def test_queues_are_mapped_to_iothreads() -> None:
    config = mapped({"iothread": "a", "vqs": [2, 0]}, {"iothread": "b", "vqs": ["1"]})
    assert (config.io_threads, config.queue_threads) == (("a", "b"), (0, 1, 0))
    text = ",iothread-vq-mapping.0.iothread=a,iothread-vq-mapping.0.vqs.0=2"
    text += ",iothread-vq-mapping.0.vqs.1=0,iothread-vq-mapping.1.iothread=b"
    text += ",iothread-vq-mapping.1.vqs.0=1,num-queues=3"
    assert parse(UNIX + text) == config
    config = mapped({"iothread": "a"}, {"iothread": "b", "vqs": []})
    assert (config.io_threads, config.queue_threads) == (("a", "b"), ())
    assert mapped().io_threads == ()


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([{"iothread": "a"}, {"iothread": "a"}], 'duplicate IOThread name "a"'),
        (
            [{"iothread": "a", "vqs": [0, 1, 2]}, {"iothread": "b"}],
            "either all items in iothread-vq-mapping must have vqs or none of them must have it",
        ),
        (
            [{"iothread": "a", "vqs": [3]}],
            'vq index 3 for IOThread "a" must be less than num_queues 3 in iothread-vq-mapping',
        ),
        (
            [{"iothread": "a", "vqs": [0, 1]}, {"iothread": "b", "vqs": [1, 2]}],
            'cannot assign vq 1 to IOThread "b" because it is already assigned',
        ),
        ([{"iothread": "a", "vqs": [0, 2]}], "missing vq 1 IOThread assignment"),
        ([{"vqs": [0]}], "Parameter 'iothread-vq-mapping.0.iothread' is missing"),
        ([{"iothread": 5}], "'iothread-vq-mapping.0.iothread' expects a string, not '5'"),
        ([{"iothread": "a", "x": 1}], "Parameter 'iothread-vq-mapping.0.x' is unexpected"),
        ([{"iothread": "a", "vqs": 1}], "'iothread-vq-mapping.0.vqs' expects a list, not '1'"),
        ([{"iothread": "a", "vqs": [-1]}], "'iothread-vq-mapping.0.vqs.0' expects a number"),
        (["a"], "'iothread-vq-mapping.0' expects an iothread and its vqs, not 'a'"),
    ],
)
def test_queues_that_cannot_be_mapped_so(items: list[object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        mapped(*items)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("iothread-vq-mapping=a", "'iothread-vq-mapping' expects a list, not 'a'"),
        ("iothread-vq-mapping.1.iothread=a", "'iothread-vq-mapping.0' is missing"),
        ("iothread-vq-mapping.x.iothread=a", "'iothread-vq-mapping.0' is missing"),
        (
            "iothread=a,iothread-vq-mapping.0.iothread=a",
            "iothread and iothread-vq-mapping properties cannot be set at the same time",
        ),
    ],
)
def test_mapping_that_is_none(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse(f"{UNIX},{text}")


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
    options: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=f"={value}: "):
        ExportConfig(id="e", node_name="d", **options)
