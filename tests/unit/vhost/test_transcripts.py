"""What QEMU said once is answered as it was then; the recordings are in tests/data."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.data.record_vhost_user import CONFIG, FEATURES, QUEUES
from vhostblk.vhost.action import (
    AddRegion,
    CloseFds,
    MapMemory,
    ReadConfig,
    SetBackendChannel,
    SetFeatures,
    StartVring,
    StopVring,
)
from vhostblk.vhost.message import Decoder, Message, ProtocolFeature, VringState
from vhostblk.vhost.session import Session

TRANSCRIPTS = Path(__file__).parents[2] / "data"
WITHOUT_SLOTS = (
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
)
WITH_SLOTS = WITHOUT_SLOTS | ProtocolFeature.CONFIGURE_MEM_SLOTS


class Replay:
    """One conversation held again, with the data path's answers taken from the recording."""

    def __init__(self, name: str, protocol_features: ProtocolFeature) -> None:
        self.session = Session(
            device_features=int(FEATURES),
            num_queues=QUEUES,
            config_size=len(CONFIG),
            protocol_features=protocol_features,
        )
        self.kinds: list[type] = []
        self.open: set[int] = set()
        text = (TRANSCRIPTS / name).read_text()
        self.lines = [json.loads(line) for line in text.splitlines()]

    def run(self) -> None:
        decoder, next_fd = Decoder(), 100
        for position, line in enumerate(self.lines):
            if line["from"] == "back-end":
                continue
            fds = range(next_fd, next_fd + line["fds"])
            next_fd = fds.stop
            self.open.update(fds)
            (message,) = decoder.feed(bytes.fromhex(line["bytes"]), fds)
            following = self.lines[position + 1] if position + 1 < len(self.lines) else line
            answered = following["from"] == "back-end"
            expected = bytes.fromhex(following["bytes"]) if answered else None
            reply = self.handle(message, expected)
            assert (reply.encode() if reply else None) == expected, message

    def handle(self, message: Message, expected: bytes | None) -> Message | None:
        result: int | bytes | None = None
        for action in self.session.receive(message):
            self.kinds.append(type(action))
            match action:
                case CloseFds(fds):
                    self.open.difference_update(fds)
                case SetBackendChannel(fd):
                    self.open.remove(fd)
                case ReadConfig(offset, size):
                    result = CONFIG[offset : offset + size]
                case StopVring():
                    assert expected is not None
                    result = VringState.unpack(expected[12:]).num
        return self.session.complete(result)


@pytest.mark.parametrize(
    ("name", "features"),
    [
        ("vhost_user_qemu_slots.jsonl", WITH_SLOTS),
        ("vhost_user_qemu_table.jsonl", WITHOUT_SLOTS),
    ],
)
def test_qemu_is_answered_as_it_was(name: str, features: ProtocolFeature) -> None:
    replay = Replay(name, features)
    replay.run()
    # Firmware uses one queue, Linux one per CPU.
    assert replay.kinds.count(StartVring) == replay.kinds.count(StopVring) == 1 + QUEUES
    assert replay.kinds.count(SetFeatures) >= 2
    assert replay.open  # call and error fds outlive the rings
    for action in replay.session.close():
        assert isinstance(action, CloseFds)
        replay.open.difference_update(action.fds)
    assert replay.open == set()


def test_qemu_sends_memory_once_with_slots_and_at_each_start_without() -> None:
    slots = Replay("vhost_user_qemu_slots.jsonl", WITH_SLOTS)
    table = Replay("vhost_user_qemu_table.jsonl", WITHOUT_SLOTS)
    slots.run()
    table.run()
    assert (slots.kinds.count(AddRegion), slots.kinds.count(MapMemory)) == (1, 0)
    assert (table.kinds.count(AddRegion), table.kinds.count(MapMemory)) == (0, 2)
