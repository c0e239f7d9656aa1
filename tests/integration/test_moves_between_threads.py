"""Exports move between engine threads while they are used (row B27); their front-ends notice nothing.

The daemon runs on a loop in a thread of its own, so that clients, which block, can be here; `vhostblk bench --verify`
is a process of its own: it has an error for a chain that is used twice, or by mistake, and waits for each that it gave.

In the suite a busy export moves a few hundred times; with VHOSTBLK_LONG (`make verify`) it is a thousand in each place.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import os
import random
import tempfile
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests import daemons
from vhostblk.block.filters.filter import FilterNode
from vhostblk.block.iov import IoVec
from vhostblk.block.keyval import parse_options
from vhostblk.client.client import Client
from vhostblk.daemon import Daemon, DaemonConfig, IOThreadConfig
from vhostblk.errors import BlockError, ConfigError, SessionError
from vhostblk.export.error_policy import IoStatus
from vhostblk.export.export import Export
from vhostblk.export.io_thread import IOThread
from vhostblk.export.native_path import NativeDataPath
from vhostblk.export.options import parse_export
from vhostblk.export.vq_mapping import VqMapping
from vhostblk.native import Message, MessageType
from vhostblk.testing.daemon_process import VHOSTBLK
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require
from vhostblk.testing.resources import Resources, wait_until_released
from vhostblk.virtio.blk import RequestType, Status

_MOVES = 1000 if "VHOSTBLK_LONG" in os.environ else 200
_IMAGE = 32 << 20
_THREADS = ("a", "b", "c")
_QUEUES = 3


def eventually(condition: Callable[[], bool]) -> None:
    daemons.eventually(condition, "")


class Gate(FilterNode):
    """Reads wait at it while it is closed, and fail while `error` is set."""

    driver_name = "gate"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.is_open = asyncio.Event()
        self.is_open.set()
        self.waiting = 0
        self.error = 0

    async def driver_preadv(self, offset: int, length: int, iov: IoVec) -> None:
        self.waiting += 1
        await self.is_open.wait()
        self.waiting -= 1
        if self.error:
            raise BlockError(self.error)
        await super().driver_preadv(offset, length, iov)


class Served:
    """A daemon with an export `e`, three iothreads, and the loop it runs on."""

    def __init__(self, daemon: Daemon, loop: asyncio.AbstractEventLoop, socket: Path) -> None:
        self.daemon = daemon
        self.socket = socket
        self._loop = loop

    @property
    def export(self) -> Export:
        return self.daemon.exports["e"]

    @property
    def gate(self) -> Gate:
        node = self.daemon.graph.find("d")
        assert isinstance(node, Gate)
        return node

    def begin(self, work: Coroutine[Any, Any, Any]) -> concurrent.futures.Future[Any]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return self.begin(work).result(20)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        async def inside() -> Any:
            return function(*arguments)

        return self.run(inside())

    def move(self, *threads: str) -> None:
        self.run(self.daemon.move("e", [VqMapping(thread) for thread in threads]))

    def begin_move(self, *threads: str) -> concurrent.futures.Future[Any]:
        """Returns once a queue no longer takes requests; it stops when the one is done that the caller holds."""
        told = threading.Event()
        command = IOThread.command

        def noted(thread: IOThread, kind: MessageType, **words: Any) -> asyncio.Future[Message]:
            answer = command(thread, kind, **words)
            if kind is MessageType.QUEUE_STOP:
                told.set()
            return answer

        with mock.patch.object(IOThread, "command", noted):
            moving = self.begin(self.daemon.move("e", [VqMapping(thread) for thread in threads]))
            assert told.wait(20)
        # Commands are carried out in order: what has an answer to this one has been told to stop.
        self.run(self.export._path.revoke(0, 512))
        assert not moving.done()
        return moving

    def attached(self) -> tuple[IOThread, ...]:
        path = self.export._path
        assert isinstance(path, NativeDataPath)
        return path._threads.attached

    def names(self) -> set[str]:
        return {thread.name for thread in self.attached()}

    def connect(self, queues: int = 1) -> Client:
        return Client.connect(self.socket, queues=queues)


@contextmanager
def served(
    socket: Path, node: str, options: str = "iothread=a", data_path: str = "native"
) -> Iterator[Served]:
    if data_path == "native":
        require("engine")
    export = f"vhost-user-blk,id=e,node-name=d,writable=on,num-queues={_QUEUES},addr.type=unix,addr.path={socket}"
    config = DaemonConfig(
        blockdevs=[parse_options(node, "driver")],
        io_threads=[IOThreadConfig(name) for name in _THREADS],
        exports=[parse_export(parse_options(f"{export},{options}", "type"))],
        data_path=data_path,
    )
    ready, made = threading.Event(), []

    async def live() -> None:
        daemon = Daemon(config, ready.set)
        daemon.graph.drivers.register(Gate)
        made.append(Served(daemon, asyncio.get_running_loop(), socket))
        await daemon.run()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(asyncio.run, live())
        concurrent.futures.wait([running, pool_wait(ready)], 10, "FIRST_COMPLETED")
        try:
            if running.done():
                running.result()
            assert ready.is_set(), "it does not start"
            yield made[0]
        finally:
            if not running.done():
                made[0].call(made[0].daemon.stop)
            running.result(30)


def pool_wait(event: threading.Event) -> concurrent.futures.Future[None]:
    """An event as a future, which is done after a while anyway."""
    future: concurrent.futures.Future[None] = concurrent.futures.Future()

    def wait() -> None:
        event.wait(10)
        future.set_result(None)

    threading.Thread(target=wait).start()
    return future


@pytest.fixture
def gated(socket_directory: Path) -> Iterator[Served]:
    node = "gate,node-name=d,file.driver=memory,file.size=1M"
    with served(socket_directory / "e", node, "iothread=a,rerror=stop") as one:
        yield one


def close(gate: Gate) -> None:
    gate.is_open.clear()


def hold(one: Served, client: Client, queue: int = 0) -> Any:
    """A read that is in flight until the gate opens."""
    one.call(close, one.gate)
    pending = client.submit(RequestType.IN, 0, room=512, queue=queue)
    eventually(lambda: one.gate.waiting == 1)
    return pending


# ---------------------------------------------------------------- row B27's proof


@pytest.mark.timeout(_MOVES + 40)
@pytest.mark.parametrize(("place", "moves"), [("/dev/shm", _MOVES), ("/var/tmp", _MOVES // 5)])
def test_busy_export_moves_a_thousand_times_without_lost_or_duplicated_completions(
    socket_directory: Path, place: str, moves: int
) -> None:
    with tempfile.TemporaryDirectory(dir=place, prefix="vb-") as folder:
        image = Path(folder) / "image"
        with image.open("wb") as file:
            file.truncate(_IMAGE)
        node = f"raw,node-name=d,discard=unmap,file.driver=file,file.filename={image}"
        options = "iothread-vq-mapping.0.iothread=a,iothread-vq-mapping.1.iothread=b"
        with served(socket_directory / "e", node, options) as one:
            one.begin(_move_under_load(one, moves)).result(_MOVES)
            statistics = one.export.statistics()
            assert statistics.hits > 0
            assert statistics.misses > 0


async def _move_under_load(one: Served, wanted: int) -> None:
    choice, moves, busy = random.Random(7), 0, 0
    before = None
    # At least so often while it was busy: on a machine that is, too, nobody may have been served between two moves.
    while moves < wanted or busy <= wanted / 4:
        bench = await asyncio.create_subprocess_exec(
            *(*VHOSTBLK, "bench", str(one.socket), "--verify", "--queues", str(_QUEUES)),
            *("--depth", "16", "--size", "4M", "--requests", "30000", "--block-size", "512-16k"),
            *("--pattern", "read=45,write=45,flush=1,discard=4,write-zeroes=5"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output = asyncio.create_task(bench.communicate())
        while not output.done():
            served_before = one.export.statistics().requests
            await one.daemon.move("e", _some_threads(choice))
            if one.export._is_in_use():
                moves += 1
            await asyncio.sleep(choice.choice([0, 0, 0.001]))
            busy += one.export.statistics().requests > served_before
        _, error = await output
        assert bench.returncode == 0, f"{moves} moves\n{error.decode()}"
        if before is None:
            before = Resources.of()
    assert before is not None
    for thread in ("vhostblk-io", "python", "python3", "pytest"):
        before.threads[thread] += 64
    assert not await asyncio.to_thread(wait_until_released, before)


def _some_threads(choice: random.Random) -> list[VqMapping]:
    names = choice.sample(_THREADS, choice.randint(0, len(_THREADS)))
    if len(names) != 2 or choice.random() < 0.5:
        return [VqMapping(name) for name in names]  # none: threads of its own
    first, *others = choice.sample(range(_QUEUES), _QUEUES)
    return [VqMapping(names[0], (first,)), VqMapping(names[1], tuple(others))]


# ---------------------------------------------------------------- what else may happen meanwhile


def test_what_is_submitted_while_its_queue_moves_is_served_on_the_other_thread(
    gated: Served,
) -> None:
    with gated.connect(queues=2) as client:
        held = hold(gated, client)
        moving = gated.begin_move("b")
        meanwhile = [client.submit(RequestType.OUT, 512, out=bytes(512)) for _ in range(5)]
        # The other queue has its turn afterwards, and serves as long as it stands still.
        client.write(1024, b"x" * 512, queue=1)
        assert not any(pending.is_done for pending in (held, *meanwhile))
        gated.call(gated.gate.is_open.set)
        client.wait([held, *meanwhile])
        moving.result(10)
        assert gated.names() == {"b"}
        assert client.read(1024, 512) == b"x" * 512


def test_export_that_an_error_has_paused_does_not_move_before_it_is_resumed(
    gated: Served, expect_log: ExpectedLog
) -> None:
    expect_log.expect("its queues are paused")
    with gated.connect() as client:
        gated.gate.error = errno.EIO
        pending = client.submit(RequestType.IN, 0, room=512)
        eventually(lambda: gated.export.io_status is IoStatus.FAILED)
        with pytest.raises(ConfigError, match="paused by an error of its disk") as error:
            gated.move("b")
        assert error.value.errno == errno.EBUSY
        gated.gate.error = 0
        gated.call(gated.export.resume)
        client.wait([pending])
        assert pending.status == Status.OK
        gated.move("b")
        assert client.read(0, 512) == bytes(512)


def park_during_a_move(one: Served, client: Client) -> tuple[Any, concurrent.futures.Future[Any]]:
    pending = hold(one, client)
    moving = one.begin_move("b")
    one.gate.error = errno.EIO
    one.call(one.gate.is_open.set)
    eventually(lambda: one.export.io_status is IoStatus.FAILED)
    assert not moving.done()
    return pending, moving


def test_request_that_is_parked_during_a_move_is_tried_again_and_then_the_move_goes_on(
    gated: Served, expect_log: ExpectedLog
) -> None:
    expect_log.expect("its queues are paused")
    with gated.connect() as client:
        pending, moving = park_during_a_move(gated, client)
        gated.gate.error = 0
        gated.call(gated.export.resume)
        moving.result(10)
        client.wait([pending])
        assert pending.status == Status.OK
        assert gated.names() == {"b"}
        assert client.read(0, 512) == bytes(512)


def disable(client: Client) -> None:
    client.control.ask(client.control.frontend.set_vring_enable(0, False))


def stop(client: Client) -> None:
    client.stop_queue(0)


def share_more(client: Client) -> None:
    client.add_memory(1 << 20)


@pytest.mark.parametrize("wish", [disable, stop, share_more])
def test_front_end_does_not_wait_for_people_who_could_resume_a_move(
    gated: Served, expect_log: ExpectedLog, wish: Callable[[Client], None]
) -> None:
    expect_log.expect("its queues are paused")
    with gated.connect() as client:
        pending, moving = park_during_a_move(gated, client)
        wish(client)
        moving.result(10)
        client.wait([pending])
        assert pending.status == Status.IOERR
        assert gated.names() == {"b"}


def test_session_that_ends_during_a_move_leaves_an_export_that_works_where_it_was_moved_to(
    gated: Served,
) -> None:
    client = gated.connect()
    hold(gated, client)
    moving = gated.begin_move("b")
    client.abandon()
    client.close()
    gated.call(gated.gate.is_open.set)
    moving.result(10)
    with gated.connect() as client:
        assert client.read(0, 512) == bytes(512)
        assert gated.names() == {"b"}


def test_daemon_stops_during_a_move(socket_directory: Path) -> None:
    node = "gate,node-name=d,file.driver=memory,file.size=1M"
    with served(socket_directory / "e", node) as one:
        client = one.connect()
        pending = hold(one, client)
        moving = one.begin_move("b")
        one.call(one.daemon.stop)
        with pytest.raises(ConfigError, match="the daemon is being stopped"):
            one.move("c")
        one.call(one.gate.is_open.set)
        moving.result(10)
    assert not pending.is_done  # as far as we have looked
    client.abandon()
    client.close()


def test_move_waits_for_the_end_of_a_drained_section_and_a_drain_does_not_wait_for_a_move(
    gated: Served,
) -> None:
    with gated.connect() as client:
        gated.run(gated.gate.drained_begin())
        pending = client.submit(RequestType.IN, 0, room=512)
        eventually(lambda: gated.export.statistics().misses == 1)
        moving = gated.begin_move("b")
        gated.run(gated.gate.drained_begin())
        gated.call(gated.gate.drained_end)
        assert not moving.done()
        gated.call(gated.gate.drained_end)
        moving.result(10)
        client.wait([pending])
        assert pending.status == Status.OK


def test_disabled_queue_stays_disabled_and_one_that_is_stopped_is_started_where_it_belongs(
    gated: Served,
) -> None:
    with gated.connect(queues=2) as client:
        disable(client)
        base = client.stop_queue(1)
        gated.move("b")
        pending = client.submit(RequestType.GET_ID, room=20)
        client.start_queue(1, base)
        client.read(0, 512, queue=1)
        client.read(0, 512, queue=1)
        assert not pending.is_done
        client.control.ask(client.control.frontend.set_vring_enable(0, True))
        client.wait([pending])


def test_broken_queue_is_not_started_anew_but_stops_as_ever(
    gated: Served, expect_log: ExpectedLog
) -> None:
    expect_log.expect("queue 0: broken by the guest")
    with gated.connect(queues=2) as client:
        client.read(0, 512)
        driver = daemons.split_ring(client)
        taken = driver.avail_idx
        driver.set_indices(taken + 1000)
        client.queues[0].kick()
        client.wait_broken()
        gated.move("b")
        driver.set_indices(taken)
        pending = client.submit(RequestType.GET_ID, room=20)  # it would do now
        for _ in range(2):
            client.read(0, 512, queue=1)
        assert not pending.is_done
        assert client.stop_queue(0) == taken
        client.start_queue(0, taken)
        client.wait([pending])


def test_cancelled_move_is_completed_first(gated: Served) -> None:
    async def cancelled() -> None:
        moving = asyncio.create_task(gated.daemon.move("e", [VqMapping("b")]))
        while len(gated.attached()) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        moving.cancel()
        gated.gate.is_open.set()
        with pytest.raises(asyncio.CancelledError):
            await moving

    with gated.connect() as client:
        pending = hold(gated, client)
        gated.run(cancelled())
        assert gated.names() == {"b"}
        client.wait([pending])


# ---------------------------------------------------------------- what cannot be


Refuse = Callable[[MessageType, str, int], None]


@pytest.fixture
def refuse(monkeypatch: pytest.MonkeyPatch) -> Refuse:
    """Threads that have no room: the next so many commands of this kind."""
    planted: dict[tuple[MessageType, str], int] = {}
    real = IOThread.command

    def command(thread: IOThread, kind: MessageType, **words: Any) -> Awaitable[Message]:
        if not planted.get((kind, thread.name)):
            return real(thread, kind, **words)
        planted[kind, thread.name] -= 1
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        answer.set_result((64, 0, 0, 0, 0, 0, 0, 0, 0, -errno.ENOMEM, 0))
        return answer

    monkeypatch.setattr(IOThread, "command", command)

    def plant(kind: MessageType, name: str, count: int) -> None:
        planted[kind, name] = count

    return plant


@pytest.mark.parametrize(
    ("kind", "thread"),
    [
        (MessageType.DISK_ATTACH, "c"),
        (MessageType.MEMORY_SET, "c"),
        (MessageType.QUEUE_START, "b"),
        (MessageType.QUEUE_START, "c"),
    ],
)
def test_move_to_a_thread_without_room_leaves_all_as_before(
    gated: Served, refuse: Refuse, kind: MessageType, thread: str
) -> None:
    with gated.connect(queues=_QUEUES) as client:
        refuse(kind, thread, 1)
        with pytest.raises(ConfigError, match=r"cannot move: .*memory"):
            gated.move("b", "c")
        assert gated.names() == {"a"}
        for queue in range(_QUEUES):
            assert client.read(0, 512, queue=queue) == bytes(512)
        gated.move("b", "c")
        assert gated.names() == {"b", "c"}
        for queue in range(_QUEUES):
            assert client.read(0, 512, queue=queue) == bytes(512)


def test_queue_that_no_thread_takes_ends_the_session_and_the_next_one_is_served(
    gated: Served, refuse: Refuse, expect_log: ExpectedLog
) -> None:
    expect_log.expect("the session ends: queue 0: out of memory")
    with gated.connect() as client:
        refuse(MessageType.QUEUE_START, "b", 1)
        refuse(MessageType.QUEUE_START, "a", 1)
        with pytest.raises(ConfigError, match="out of memory"):
            gated.move("b")
        with pytest.raises((SessionError, OSError)):
            client.read(0, 512)
        client.abandon()
    with gated.connect() as client:
        assert client.read(0, 512) == bytes(512)


def test_own_threads_are_the_same_when_it_comes_back_to_them(socket_directory: Path) -> None:
    with served(socket_directory / "e", "null-co,node-name=d,size=1M", "") as one:
        own = one.attached()
        one.move("a", "b")
        assert one.names() == {"a", "b"}
        one.move()
        assert one.attached() == own


@pytest.mark.parametrize(
    ("options", "data_path", "threads", "error"),
    [
        ("", "python", (), "Export 'e' cannot move: the Python data path has no threads"),
        ("fixed-iothread=on", "native", ("a",), "Export 'e' has fixed-iothread=on"),
        ("", "native", ("z",), 'IOThread "z" object does not exist'),
        ("", "native", ("a", "a"), 'duplicate IOThread name "a"'),
    ],
)
def test_moves_that_cannot_be_are_refused(
    socket_directory: Path, options: str, data_path: str, threads: tuple[str, ...], error: str
) -> None:
    node = "null-co,node-name=d,size=1M"
    with served(socket_directory / "e", node, options, data_path) as one:
        with pytest.raises(ConfigError, match=error):
            one.move(*threads)
        assert os.path.exists(one.socket)
