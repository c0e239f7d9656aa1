"""While a job blocks what may be done with a node, each command that would do it says so and does nothing (row B11)."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from vhostblk.block.internal_snapshot import create_snapshot, delete_snapshot
from vhostblk.block.keyval import parse_options
from vhostblk.block.length import resize
from vhostblk.block.node import BlockNode
from vhostblk.block.op_blockers import OpType, Reason
from vhostblk.block.surgery import check_replaceable
from vhostblk.daemon import Daemon, DaemonConfig
from vhostblk.errors import ConfigError
from vhostblk.export.options import parse_export

Command = Callable[[Daemon, BlockNode], Awaitable[Any]]


async def remove(daemon: Daemon, node: BlockNode) -> None:
    await daemon.graph.remove("alone")


async def replace(daemon: Daemon, node: BlockNode) -> None:
    check_replaceable(daemon.graph, daemon.graph.find("above"), "d")


def grow(daemon: Daemon, node: BlockNode) -> Awaitable[None]:
    return resize(daemon.graph, daemon.exports["e"].device.backend, node, 2 << 20)


COMMANDS: dict[OpType, Command] = {
    OpType.EJECT: lambda daemon, node: daemon.remove_medium("e", force=True),
    OpType.CHANGE: lambda daemon, node: daemon.change_medium("e", "alone", force=True),
    OpType.DATAPLANE: lambda daemon, node: daemon.move("e"),
    OpType.DRIVE_DEL: remove,
    OpType.RESIZE: grow,
    OpType.REPLACE: replace,
    OpType.INTERNAL_SNAPSHOT: lambda daemon, node: create_snapshot(daemon.graph, node, "now"),
    OpType.INTERNAL_SNAPSHOT_DELETE: lambda daemon, node: delete_snapshot(daemon.graph, node, "1"),
}
NO_COMMAND_YET = {
    *(OpType.BACKUP_SOURCE, OpType.BACKUP_TARGET, OpType.COMMIT_SOURCE, OpType.COMMIT_TARGET),
    *(OpType.MIRROR_SOURCE, OpType.MIRROR_TARGET, OpType.STREAM, OpType.EXTERNAL_SNAPSHOT),
}


def test_every_operation_is_one_of_a_command_or_has_none_yet() -> None:
    assert COMMANDS.keys() | NO_COMMAND_YET == set(OpType)


@pytest.mark.parametrize("operation", COMMANDS, ids=lambda operation: operation.name)
def test_command_is_refused_with_ebusy_while_a_job_holds_the_blocker(
    socket_directory: Path, operation: OpType
) -> None:
    nodes = [
        "memory,node-name=d,size=1M",
        "memory,node-name=alone,size=1M",
        "raw,node-name=above,file=d",
    ]
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,addr.type=unix,addr.path={socket_directory / 'e'}"
    config = DaemonConfig(
        blockdevs=[parse_options(node, "driver") for node in nodes],
        exports=[parse_export(parse_options(export, "type"))],
        data_path="python",
    )

    async def everything() -> None:
        ready = asyncio.Event()
        daemon = Daemon(config, ready.set)
        running = asyncio.create_task(daemon.run())
        await ready.wait()
        node = daemon.graph.find("alone" if operation is OpType.DRIVE_DEL else "d")
        reason = Reason("a job runs")
        node.op_blockers.block(reason, (operation,))
        try:
            with pytest.raises(
                ConfigError, match=f"'{node.node_name}' is busy: a job runs"
            ) as caught:
                await COMMANDS[operation](daemon, node)
            assert caught.value.errno == errno.EBUSY
            assert daemon.exports["e"].device.backend.node is daemon.graph.find("d")
            assert daemon.graph.find("alone").length == node.length == 1 << 20
        finally:
            node.op_blockers.unblock(reason)
            daemon.stop()
            await running

    asyncio.run(everything())
