"""Daemons that end in the middle of everything: the guest goes on with the next one, and every byte is right.

A random load of reads, writes, flushes, discards and zero-writes, 64 at a time on 4 queues, in which every read has
one right answer; what was completed has to be there, and what was not has to complete.
VHOSTBLK_HUNT=N: N times as many ends.
"""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tests.daemons import Disks, eventually
from tests.requirements import require
from tests.restarts import ForkServer, SurvivingClient
from tests.schedule import HUNT
from vhostblk.client.manners import FEATURES
from vhostblk.client.workload import Workload
from vhostblk.errors import SessionError
from vhostblk.testing.daemon_process import is_listening
from vhostblk.virtio.features import Feature

SIZE = 16 << 20
SPAN = 2 << 20  # requests meet
DEPTH = 64
QUEUES = 4
ENDS = 10
KILLS = 15

_FORMATS = {
    "raw": ("serve", "{image}", "--format", "raw"),
    "direct": ("serve", "{image}", "--format", "raw", "--cache", "none"),
    "qcow2": ("serve", "{image}", "--format", "qcow2"),
    "qcow2-python": ("serve", "{image}", "--format", "qcow2", "--data-path", "python"),
    "write-through": ("serve", "{image}", "--format", "raw", "--cache", "writethrough"),
}
_KILLED = [(name, "split") for name in sorted(_FORMATS)]
_KILLED += [(name, "packed") for name in ("direct", "qcow2", "raw") if name == "qcow2" or HUNT > 1]


@pytest.fixture
def words(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    """The daemon's command line, but for the socket."""
    image = tmp_path / "disk.img"
    if request.param.startswith("qcow2"):
        command = [require("qemu-img", group="qemu"), "create", "-qf", "qcow2"]
        options = ["-o", "cluster_size=4096"]  # there are always new ones
        subprocess.run([*command, *options, str(image), str(SIZE)], check=True)
    else:
        with image.open("wb") as file:
            file.truncate(SIZE)
    words = [word.format(image=image) for word in _FORMATS[request.param]]
    return ["--log-level", "warning", *words, "--iothreads", "2", "--lock-timeout", "30"]


def connect(path: str, *, packed: bool = False) -> SurvivingClient:
    """The first connection, to a daemon that is starting."""
    eventually(lambda: is_listening(path), "a daemon listens", 30)
    features = FEATURES | (Feature.VIRTIO_F_RING_PACKED if packed else 0)
    client = SurvivingClient.connect(path, queues=QUEUES, features=features, timeout=60)
    assert isinstance(client, SurvivingClient)
    assert packed == bool(client.control.features & Feature.VIRTIO_F_RING_PACKED)
    return client


def run(client: SurvivingClient, ends: int, seed: int, span: int = SPAN) -> None:
    """The load, until there have been so many ends, and then every byte."""
    load = Workload(client, seed=seed, span=(0, span), depth=DEPTH, max_length=32 << 10)
    while client.left:
        load.run(500)
    load.verify()
    assert client.replacements == ends
    assert not any(load.counts.errors.values())


@pytest.mark.timeout(60 + 5 * HUNT * ENDS)
@pytest.mark.parametrize("words", ["raw", "qcow2"], indirect=True)
def test_no_request_is_lost_or_done_twice_when_daemons_are_stopped_in_order(
    words: list[str], socket_directory: Path
) -> None:
    """Each drains and flushes; the socket is a path that goes and comes."""
    path = os.fspath(socket_directory / "s")
    with ForkServer([*words, "--socket", path]) as server:
        client = connect(path)
        with client:

            def replace() -> None:
                assert server.stop() == 0, server.output
                server.start()
                client.come_back()

            client.begin(path, replace, ENDS * HUNT, seed=1)
            run(client, ENDS * HUNT, seed=2)
        assert server.started == ENDS * HUNT + 1


@pytest.mark.timeout(60 + 5 * HUNT * ENDS)
@pytest.mark.parametrize("words", ["direct"], indirect=True)
def test_no_connect_is_refused_while_daemons_replace_each_other_on_one_listening_socket(
    words: list[str], socket_directory: Path
) -> None:
    """As systemd holds it: the socket is there while no daemon is."""
    path = os.fspath(socket_directory / "s")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        fd = listener.fileno()
        with ForkServer([*words, "--fd", str(fd)], pass_fds=[fd]) as server:
            client = connect(path)
            with client:

                def replace() -> None:
                    assert server.stop() == 0, server.output
                    # With nobody there: waits in the backlog until the next daemon takes it.
                    client.abandon()
                    begun = socket.socket(socket.AF_UNIX)
                    begun.connect(path)
                    server.start()
                    client.reconnect(begun)

                client.begin(path, replace, ENDS * HUNT, seed=3)
                run(client, ENDS * HUNT, seed=4)


@pytest.mark.timeout(60 + 5 * HUNT * KILLS)
@pytest.mark.parametrize(("words", "rings"), _KILLED, indirect=["words"])
def test_no_request_is_lost_or_done_twice_when_daemons_are_killed(
    words: list[str], socket_directory: Path, rings: str
) -> None:
    """Anywhere: while they start, while nobody or somebody is connected, between any two stores."""
    path = os.fspath(socket_directory / "s")
    with ForkServer([*words, "--socket", path]) as server:
        client = connect(path, packed=rings == "packed")
        with client:

            def replace() -> None:
                server.kill()
                server.start()
                if client.choice.random() < 0.8:
                    client.come_back()

            client.begin(path, replace, KILLS * HUNT, seed=5)
            # All of it, so that clusters get their places all the time: their tables have to survive, too.
            run(client, KILLS * HUNT, seed=6, span=SIZE)
        assert server.started == KILLS * HUNT + 1


@pytest.mark.parametrize("disks", ["native"], indirect=True)
def test_client_that_is_hung_up_on_while_it_comes_back_still_knows_what_was_agreed_on(
    disks: Disks,
) -> None:
    with disks.connect() as client:
        features = client.control.features
        ours, theirs = socket.socketpair()
        theirs.close()
        with pytest.raises(SessionError):
            client.reconnect(ours)
        client.reconnect(disks.socket("disk"))
        assert client.control.features == features
        client.read(0, 512)
