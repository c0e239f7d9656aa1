"""Any requests at any time, by several users, on any graph, which changes meanwhile: no byte is wrong, and none that
was promised is lost with the power (rows B12 to B20, B24 to B26, B30, B31, B34).

Every rule begins something, and lets everybody have a few turns; so requests, cancellations, drains, flushes, and
changes of the graph overlap as they like.
"""

from __future__ import annotations

import asyncio
import errno
import mmap
import random
import shutil
import tempfile
from collections.abc import Coroutine
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tests.schedule import HUNT, ScheduledLoop, turns
from tests.unit.block.crash_disk import INJECTED, CrashDisk
from tests.unit.block.modelled_disk import Disk, Engine
from tests.unit.block.slow_nodes import SIZE, SlowFile
from vhostblk.block import surgery
from vhostblk.block.backend import BlockBackend
from vhostblk.block.iov import IoVec
from vhostblk.block.node import BlockNode, Req
from vhostblk.block.quiesce import drained, subtree_drained
from vhostblk.block.reopen import reopen
from vhostblk.block.tracking import RequestType
from vhostblk.errors import ConfigError
from vhostblk.testing.plugin import ExpectedLog

MOST_AT_ONCE = 12

modes = st.sampled_from(
    [
        {"discard": discard, "detect-zeroes": detect}
        for discard in ("unmap", "ignore")
        for detect in ("off", "on", "unmap")
        if discard == "unmap" or detect != "unmap"
    ]
)
aligns = st.sampled_from([1, 16, 512, 512, 1024])
small = st.integers(0, 3)


def common(**options: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda own, modes: {**own, **modes}, st.fixed_dictionaries(options), modes)


leaves = st.one_of(
    common(
        driver=st.just("crash-disk"),
        align=aligns,
        **{"max-transfer": small, "max-iov": st.integers(1, 4)},
        memory=st.sampled_from([1, 4, 512]),
        fua=st.booleans(),
        zeroes=st.booleans(),
        unit=small,
    ),
    common(driver=st.just("file")),
    common(driver=st.just("direct-file")),
    common(driver=st.just("file"), aio=st.just("threads")),
    common(driver=st.just("memory"), size=st.just(SIZE)),
    common(driver=st.just("overlay")),
    st.just({"driver": "null-co", "size": SIZE, "latency-ns": 100}),
)


EVENTS = (
    *("none", "pwritev_rmw_head", "pwritev_rmw_tail", "pwritev", "pwritev_zero"),
    *("write_aio", "read_aio", "cor_write", "flush_to_disk"),
)


@st.composite
def blkdebugs(draw: st.DrawFn) -> dict[str, Any]:
    align = draw(st.sampled_from([0, 512, 1024, 2048]))
    unit = align or 2048
    limits = {
        "align": align,
        "max-transfer": unit * draw(small),
        "opt-write-zero": unit * draw(st.sampled_from([0, 1, 2])),
        "opt-discard": unit * draw(st.sampled_from([0, 1, 2])),
    }
    errors = draw(
        st.lists(
            st.fixed_dictionaries(
                {
                    "event": st.sampled_from(EVENTS),
                    "iotype": st.sampled_from(
                        ["read", "write", "write-zeroes", "discard", "flush"]
                    ),
                    "errno": st.just(INJECTED),
                    "once": st.booleans(),
                    "immediately": st.booleans(),
                }
            ),
            max_size=2,
        )
    )
    return {"driver": "blkdebug", **limits, "inject-error": errors, "discard": "unmap"}


filters = st.one_of(
    blkdebugs(),
    common(driver=st.just("throttle"), **{"throttle-group": st.just("tg")}),
    common(driver=st.just("copy-on-read")),
    common(driver=st.just("pass")),
)
layers = st.one_of(
    filters,
    common(driver=st.just("raw")),
    common(driver=st.just("raw"), offset=st.sampled_from([0, 512, 2048, 100])),
    common(driver=st.just("raw"), size=st.sampled_from([4096, 2048])),
)
# Most of them meet.
offsets = st.one_of(st.sampled_from([0, 512, 1024]), st.integers(0, 1500), st.integers(0, SIZE))
sizes = st.one_of(
    st.sampled_from([0, 1, 512, 1024, 4096, SIZE]), st.integers(1, 1000), st.integers(0, SIZE)
)
flags = st.sampled_from(
    [
        *(0, 0, 0),
        int(Req.FUA),
        int(Req.SERIALISING),
        int(Req.FUA | Req.SERIALISING),
        int(Req.SERIALISING | Req.NO_WAIT),
    ]
)
which = st.integers(0, 7)
pauses = st.sampled_from([0, 0, 0, 0, 1, 2, 4, 8])


def cut(length: int, at: list[int], shift: int) -> IoVec:
    """A vector in mapped memory, shifted against the page, cut at the given places."""
    memory = memoryview(mmap.mmap(-1, length + shift + 1))
    places = sorted({0, length, *(place % (length + 1) for place in at)})
    return IoVec([memory[shift + a : shift + b] for a, b in pairwise(places)])


memories = st.tuples(st.lists(st.integers(0, SIZE), max_size=5), st.sampled_from([0, 0, 1, 4, 512]))

hows = st.tuples(memories, flags, st.sampled_from([False, False, False, True]))


@pytest.fixture(autouse=True)
def _errors_on_purpose(expect_log: ExpectedLog) -> None:
    expect_log.allow(r"flush at close failed: .*\(EREMOTEIO\)")


class RequestsMachine(RuleBasedStateMachine):
    """See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="vb-"))
        self.choice = random.Random(0)
        self.loop = ScheduledLoop(lambda count: self.choice.randrange(count))
        self.disk = Disk(self.folder / "disk")
        self.tasks: list[asyncio.Task[Any]] = []
        self.drains: list[asyncio.Event] = []
        self.filters: list[BlockNode] = []
        self.engine: Engine | None = None
        self.in_place = False

    @initialize(
        leaf=leaves,
        above=st.lists(layers, max_size=3),
        second=which,
        write_cache=st.booleans(),
        seed=st.integers(0, 1000),
    )
    def build(
        self,
        leaf: dict[str, Any],
        above: list[dict[str, Any]],
        second: int,
        write_cache: bool,
        seed: int,
    ) -> None:
        self.choice.seed(seed)

        async def do() -> None:
            await self.disk.open(leaf, *above)
            self.disk.use(self.disk.top, write_cache=write_cache)
            nodes = self.disk.nodes()
            while alignment(nodes[-1]) < max(map(alignment, nodes)):
                # Whoever is below one that reads, modifies and writes whole blocks gets in its way.
                nodes.pop()
            self.disk.use(nodes[second % len(nodes)])
            self.engine = self.disk.engine(self.disk.users[0])
            self.disk.engine(self.disk.users[1])

        try:
            self.loop.run_until_complete(do())
            self.in_place = True
        except ConfigError as error:
            # A window that is not inside, limits that make no sense.
            note(f"no graph: {error}")
            self.loop.run_until_complete(self.disk.close())
        if any(layer["driver"] == "blkdebug" and layer["inject-error"] for layer in above):
            self.disk.may_fail.add(INJECTED)

    # ------------------------------------------------------------------ doing

    def begin(self, coro: Coroutine[Any, Any, Any], pause: int, name: str) -> None:
        self.tasks.append(self.loop.create_task(coro, name=name))
        self.go_on(pause)

    def go_on(self, pause: int) -> None:
        self.loop.run_until_complete(turns(pause))
        for task in tuple(self.tasks):
            if task.done():
                self.tasks.remove(task)
                if not task.cancelled():
                    task.result()

    def user(self, number: int) -> BlockBackend:
        return self.disk.users[number % len(self.disk.users)]

    def range_of(self, user: BlockBackend, offset: int, length: int) -> tuple[int, int]:
        offset %= user.length + 1
        return offset, min(length, user.length - offset)

    # ------------------------------------------------------------------ requests

    has_room = precondition(lambda self: self.in_place and len(self.tasks) < MOST_AT_ONCE)

    @has_room
    @rule(user=which, offset=offsets, size=sizes, how=hows, pause=pauses)
    def write(self, user: int, offset: int, size: int, how: Any, pause: int) -> None:
        memory, flags, is_zero = how
        who = self.user(user)
        offset, length = self.range_of(who, offset, size)
        if flags & Req.NO_WAIT:
            self.disk.may_fail.add(errno.EBUSY)
        vector = cut(length, *memory)
        self.begin(self.disk.write(who, offset, vector, flags, is_zero), pause, "write")

    @has_room
    @rule(user=which, offset=offsets, size=sizes, memory=memories, pause=pauses)
    def read(self, user: int, offset: int, size: int, memory: Any, pause: int) -> None:
        who = self.user(user)
        offset, length = self.range_of(who, offset, size)
        self.begin(self.disk.read(who, offset, cut(length, *memory)), pause, "read")

    @has_room
    @rule(
        user=which, offset=offsets, size=sizes, may_unmap=st.booleans(), flags=flags, pause=pauses
    )
    def write_zeroes(
        self, user: int, offset: int, size: int, may_unmap: bool, flags: int, pause: int
    ) -> None:
        who = self.user(user)
        offset, length = self.range_of(who, offset, size)
        if flags & Req.NO_WAIT:
            self.disk.may_fail.add(errno.EBUSY)
        self.begin(self.disk.write_zeroes(who, offset, length, may_unmap, flags), pause, "zero")

    @has_room
    @rule(user=which, offset=offsets, size=sizes, pause=pauses)
    def discard(self, user: int, offset: int, size: int, pause: int) -> None:
        who = self.user(user)
        offset, length = self.range_of(who, offset, size)
        self.begin(self.disk.discard(who, offset, length), pause, "discard")

    @has_room
    @rule(user=which, pause=pauses)
    def flush(self, user: int, pause: int) -> None:
        self.begin(self.disk.flush(self.user(user)), pause, "flush")

    @has_room
    @rule(user=which, offset=offsets, size=sizes, is_write=st.booleans(), pause=pauses)
    def request_by_engine(
        self, user: int, offset: int, size: int, is_write: bool, pause: int
    ) -> None:
        engine = self.disk.engines[user % 2]
        offset, length = self.range_of(self.user(user), offset, size)
        self.begin(engine.request(offset, cut(length, [], 0), is_write), pause, "engine")

    @has_room
    @rule(user=which, pause=pauses)
    def flush_by_engine(self, user: int, pause: int) -> None:
        self.begin(self.disk.engines[user % 2].flush(), pause, "engine's flush")

    # ------------------------------------------------------------------ what disturbs them

    @rule(pause=st.integers(1, 50))
    def wait(self, pause: int) -> None:
        self.go_on(pause)

    @precondition(lambda self: self.tasks)
    @rule(number=which, pause=pauses)
    def cancel(self, number: int, pause: int) -> None:
        task = self.tasks[number % len(self.tasks)]
        if not task.get_name().startswith("engine"):
            task.cancel()
        self.go_on(pause)

    @has_room
    @rule(number=which, subtree=st.booleans(), pause=pauses)
    def begin_drain(self, number: int, subtree: bool, pause: int) -> None:
        nodes = self.disk.nodes()
        node = nodes[number % len(nodes)]
        over = asyncio.Event()

        async def drain() -> None:
            async with (subtree_drained if subtree else drained)(node):
                while not over.is_set():
                    seen = {node, *(below(node) if subtree else ())}
                    # Whoever changes the graph flushes and resizes in drains of its own.
                    requests = [request for node in seen for request in node.tracker.requests]
                    assert all(request.kind is RequestType.TRUNCATE for request in requests)
                    await turns(1)

        self.drains.append(over)
        self.begin(drain(), pause, "drain")

    @precondition(lambda self: self.drains)
    @rule(number=which, pause=pauses)
    def end_drain(self, number: int, pause: int) -> None:
        self.drains.pop(number % len(self.drains)).set()
        self.go_on(pause)

    @precondition(lambda self: self.in_place and isinstance(self.disk.leaf, CrashDisk))
    @rule(kind=st.sampled_from(["read", "write", "zero", "discard", "flush"]))
    def next_one_fails(self, kind: str) -> None:
        self.disk.may_fail.add(INJECTED)
        assert isinstance(self.disk.leaf, CrashDisk)
        self.disk.leaf.failures.planned.append(kind)

    @precondition(lambda self: self.in_place and isinstance(self.disk.leaf, SlowFile))
    @rule(kind=st.sampled_from(["read", "write", "zero", "flush"]))
    def next_of_the_file_fails(self, kind: str) -> None:
        self.disk.may_fail.add(INJECTED)
        self.disk.io.failures.planned.append(kind)

    @has_room
    @rule(number=which, options=filters, pause=pauses)
    def insert_filter(self, number: int, options: dict[str, Any], pause: int) -> None:
        nodes = self.disk.nodes()
        node = nodes[number % len(nodes)]
        options = {**options, "node-name": f"filter{len(self.filters)}"}
        first, second = self.disk.users
        if "align" in options and first.node is not second.node:
            options["align"] = 0
        if options["driver"] == "blkdebug" and options["inject-error"]:
            self.disk.may_fail.add(INJECTED)

        async def insert() -> None:
            try:
                self.filters.append(await surgery.insert_filter(self.disk.graph, node, options))
            except ConfigError:
                return  # limits that make no sense, or the node has gone

        self.begin(insert(), pause, "insert")

    @precondition(lambda self: self.filters)
    @rule(number=which, pause=pauses)
    def drop_filter(self, number: int, pause: int) -> None:
        node = self.filters.pop(number % len(self.filters))
        self.begin(surgery.drop_filter(self.disk.graph, node), pause, "drop")

    @has_room
    @rule(number=which, options=modes, pause=pauses)
    def reopen(self, number: int, options: dict[str, Any], pause: int) -> None:
        nodes = self.disk.nodes()
        node = nodes[number % len(nodes)]

        async def do() -> None:
            try:
                await reopen(self.disk.graph, {node: options})
            except ConfigError as error:
                assert "flushing" in str(error) and INJECTED in self.disk.may_fail  # noqa: PT017, PT018

        self.begin(do(), pause, "reopen")

    @precondition(
        lambda self: (
            self.in_place
            and len(self.tasks) < MOST_AT_ONCE
            and isinstance(self.disk.leaf, CrashDisk | SlowFile)
            and not any(task.get_name() == "resize" for task in self.tasks)
        )
    )
    @rule(blocks=st.integers(-2, 4), pause=pauses)
    def resize(self, blocks: int, pause: int) -> None:
        length = max(self.disk.model.length + blocks * 1024, 1024)
        if blocks < 0:
            # Whoever is behind the end has come too late.
            self.disk.may_fail |= {errno.EIO, errno.ENOSPC}
        self.begin(self.disk.resize(length), pause, "resize")

    # ------------------------------------------------------------------ what must be so

    @invariant()
    def power_may_be_cut(self) -> None:
        if self.in_place:
            self.disk.power_cut()

    def teardown(self) -> None:
        try:
            if self.in_place:
                self.loop.run_until_complete(self.end())
            self.loop.finish()
        finally:
            self.loop.close()
            self.disk.graph.bounce.close()
            shutil.rmtree(self.folder)

    async def end(self) -> None:
        for over in self.drains:
            over.set()
        results = await asyncio.gather(*self.tasks, return_exceptions=True)
        for result in results:
            if isinstance(result, Exception):
                raise result
        self.disk.io.failures.planned.clear()
        if isinstance(self.disk.leaf, CrashDisk):
            self.disk.leaf.failures.planned.clear()
        await self.disk.check()
        await self.disk.close()


def alignment(node: BlockNode) -> int:
    return node.limits.request_alignment


def below(node: BlockNode) -> set[BlockNode]:
    found: set[BlockNode] = set()
    for edge in node.children.values():
        found |= {edge.node} | below(edge.node)
    return found


TestRequestsMachine = RequestsMachine.TestCase
TestRequestsMachine.settings = settings(
    max_examples=50 * HUNT,
    stateful_step_count=30,
    suppress_health_check=list(HealthCheck),
)
