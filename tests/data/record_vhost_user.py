"""Record what QEMU says to a vhost-user-blk back-end: writes vhost_user_*.jsonl beside this file.

    python tests/data/record_vhost_user.py KERNEL INITRD

A guest boots in QEMU (TCG) with an empty disk that the `Session` under test and a few lines of
device serve: firmware first, then Linux with one queue per CPU; then the monitor quits, which stops
the queues. One line per message: who sent it, its bytes, how many fds came along. Run it again with
a newer QEMU and read the difference.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

from vhostblk.vhost.action import (
    Action,
    AddRegion,
    CloseFds,
    MapMemory,
    ReadConfig,
    RemoveRegion,
    SetBackendChannel,
    SetVringFd,
    StartVring,
    StopVring,
)
from vhostblk.vhost.mem_table import MemTable
from vhostblk.vhost.message import Message, ProtocolFeature, Request
from vhostblk.vhost.session import PROTOCOL_FEATURES, Session
from vhostblk.vhost.transport import Connection, Listener
from vhostblk.vhost.vring import VringFd, VringSnapshot
from vhostblk.virtio.features import Feature
from vhostblk.virtio.split import SplitVirtqueue

FEATURES = (
    Feature.VIRTIO_F_VERSION_1
    | Feature.VIRTIO_F_INDIRECT_DESC
    | Feature.VIRTIO_BLK_F_SEG_MAX
    | Feature.VIRTIO_BLK_F_FLUSH
    | Feature.VIRTIO_BLK_F_CONFIG_WCE
    | Feature.VIRTIO_BLK_F_MQ
)
CONFIG = (2048).to_bytes(8, "little") + bytes(4) + (126).to_bytes(4, "little") + bytes(80)
QUEUES = 2
TIMEOUT = 300  # seconds; TCG on a busy machine


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


class EmptyDisk:
    """Answers every request at once, and leaves the data as it is."""

    def __init__(self) -> None:
        self.memory = MemTable(address_of, 64)
        self.vrings: dict[int, VringSnapshot] = {}
        self.open_fds: list[int] = []

    def perform(self, action: Action) -> int | bytes | None:
        match action:
            case MapMemory(regions, fds):
                self.use(self.memory.replaced(regions, fds))
            case AddRegion(region, fd):
                self.use(self.memory.added(region, fd))
            case RemoveRegion(region):
                self.use(self.memory.removed(region))
            case StartVring(index, vring):
                self.vrings[index] = vring
                assert vring.kick_fd is not None
                asyncio.get_running_loop().add_reader(vring.kick_fd, self.serve, index)
            case SetVringFd(index, VringFd.CALL, fd):
                self.vrings[index] = replace(self.vrings[index], call_fd=fd)
            case StopVring(index):
                vring = self.vrings.pop(index)
                assert vring.kick_fd is not None
                asyncio.get_running_loop().remove_reader(vring.kick_fd)
                return vring.base
            case ReadConfig(offset, size):
                return CONFIG[offset : offset + size]
            case SetBackendChannel(fd):
                self.open_fds.append(fd)  # QEMU complains when it is closed
            case CloseFds(fds):
                for fd in fds:
                    os.close(fd)
        return None

    def use(self, memory: MemTable) -> None:
        old, self.memory = self.memory, memory
        old.close()

    def serve(self, index: int) -> None:
        vring = self.vrings[index]
        if vring.kick_fd is not None:
            os.read(vring.kick_fd, 8)
        queue = SplitVirtqueue(
            self.memory,
            vring.size,
            vring.desc,
            vring.avail,
            vring.used,
            base=vring.base,
            indirect=True,
        )
        while (chain := queue.pop()) is not None:
            chain.writable[-1][-1] = 0
            queue.push(chain.head, sum(len(view) for view in chain.writable))
        self.vrings[index] = replace(vring, base=queue.next_avail)
        if vring.call_fd is not None:
            os.write(vring.call_fd, (1).to_bytes(8, "little"))

    def close(self) -> None:
        self.memory.close()
        for fd in self.open_fds:
            os.close(fd)


class Recorder:
    """One conversation, kept as lines."""

    def __init__(self, protocol_features: ProtocolFeature) -> None:
        self.lines: list[str] = []
        self.disk = EmptyDisk()
        self.session = Session(
            device_features=int(FEATURES),
            num_queues=QUEUES,
            config_size=len(CONFIG),
            writable_config=range(32, 33),
            protocol_features=protocol_features,
        )

    def note(self, sender: str, message: Message) -> None:
        line = {
            "from": sender,
            "name": message.name(),
            "bytes": message.encode().hex(),
            "fds": len(message.fds),
        }
        self.lines.append(json.dumps(line))

    async def serve(self, connection: Connection, booted: asyncio.Event) -> None:
        while (message := await connection.receive()) is not None:
            self.note("front-end", message)
            result: int | bytes | None = None
            for action in self.session.receive(message):
                answer = self.disk.perform(action)
                result = answer if answer is not None else result
            reply = self.session.complete(result)
            if reply is not None:
                self.note("back-end", reply)
                await connection.send(reply)
            # Firmware has come and gone before: only Linux uses the second vring.
            second = self.session.vrings[1]
            if (
                message.request == Request.SET_VRING_ENABLE
                and second.is_started
                and second.is_enabled
            ):
                booted.set()
        for action in self.session.close():
            self.disk.perform(action)
        self.disk.close()


async def record(kernel: str, initrd: str, features: ProtocolFeature) -> list[str]:
    with tempfile.TemporaryDirectory() as directory:
        listener = Listener.bind(f"{directory}/socket")
        # fmt: off
        qemu = await asyncio.create_subprocess_exec(
            "qemu-system-x86_64", "-nodefaults", "-display", "none", "-monitor", "stdio",
            "-machine", "q35,accel=tcg", "-m", "256", "-smp", str(QUEUES),
            "-object", "memory-backend-memfd,id=memory,size=256M,share=on",
            "-numa", "node,memdev=memory",
            "-kernel", kernel, "-initrd", initrd, "-append", "quiet",
            "-chardev", f"socket,id=disk,path={directory}/socket",
            "-device", f"vhost-user-blk-pci,chardev=disk,num-queues={QUEUES}",
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.DEVNULL,
        )
        # fmt: on
        recorder, booted = Recorder(features), asyncio.Event()
        connection = await listener.accept()
        listener.close()
        serving = asyncio.create_task(recorder.serve(connection, booted))
        waiting = asyncio.create_task(booted.wait())
        await asyncio.wait([serving, waiting], timeout=TIMEOUT, return_when="FIRST_COMPLETED")
        waiting.cancel()
        await qemu.communicate(b"quit\n")
        await serving
        connection.close()
        if not booted.is_set():
            raise SystemExit("the guest never came to use its second queue")
    return recorder.lines


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernel")
    parser.add_argument("initrd")
    options = parser.parse_args()
    without = PROTOCOL_FEATURES & ~ProtocolFeature.CONFIGURE_MEM_SLOTS
    for features, name in ((PROTOCOL_FEATURES, "slots"), (without, "table")):
        lines = asyncio.run(record(options.kernel, options.initrd, features))
        target = Path(__file__).parent / f"vhost_user_qemu_{name}.jsonl"
        target.write_text("".join(line + "\n" for line in lines))


if __name__ == "__main__":
    main()
