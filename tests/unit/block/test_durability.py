"""What was promised is on the disk: the power may be cut at any moment of any order of events (row B19, field L2).

Writes, durable writes, zero-writes and flushes of two users and of an engine, some of which fail, run side by side on
storage with a volatile cache; after every single step the model of `disk_model.py` looks at what would be left.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.schedule import HUNT, ScheduledLoop, explore, run, turns
from tests.unit.block.crash_disk import INJECTED, CrashDisk
from tests.unit.block.modelled_disk import Disk, Engine
from vhostblk.block.iov import IoVec
from vhostblk.block.node import Req
from vhostblk.testing.plugin import ExpectedLog

FUA = int(Req.FUA)

LEAVES: dict[str, dict[str, Any]] = {
    "disk": {"driver": "crash-disk", "discard": "unmap"},
    "blocks": {"driver": "crash-disk", "align": 512, "max-transfer": 1, "zeroes": "off"},
    "FUA": {"driver": "crash-disk", "align": 512, "fua": "on", "discard": "unmap"},
    "file": {"driver": "file", "discard": "unmap"},
    "threads": {"driver": "file", "aio": "threads"},
    "O_DIRECT": {"driver": "direct-file"},
}
LAYERS: dict[str, list[dict[str, Any]]] = {
    "-": [],
    "raw": [{"driver": "raw", "discard": "unmap"}],
    "pass": [{"driver": "pass"}, {"driver": "raw", "detect-zeroes": "on"}],
}
KINDS = (
    *("write", "write", "durable write", "zero-write", "durable zero-write", "discard"),
    *("flush", "flush", "flush by the other", "write by the other"),
    *("write by the engine", "flush by the engine", "flush fails", "write fails", "pause"),
)
scripts = st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 3)), min_size=2, max_size=14)


@pytest.fixture(autouse=True)
def _errors_on_purpose(expect_log: ExpectedLog) -> None:
    expect_log.allow(r"flush at close failed: .*\(EREMOTEIO\)")


class Script:
    """A disk, and what is done with it."""

    def __init__(self, file: Path) -> None:
        self.disk = Disk(file)
        self.engine: Engine | None = None

    async def perform(
        self, leaf: str, layers: str, write_cache: bool, script: list[tuple[str, int]]
    ) -> None:
        disk = self.disk
        await disk.open(LEAVES[leaf], *LAYERS[layers])
        disk.may_fail.add(INJECTED)
        user = disk.use(disk.top, write_cache=write_cache)
        if any(kind.endswith("other") for kind, _ in script):
            disk.use(disk.leaf)  # where there are two, the engine flushes nothing
        self.engine = disk.engine(user)
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ScheduledLoop)
        loop.probe = disk.power_cut
        tasks = []
        for kind, block in script:
            tasks.append(asyncio.create_task(self._do(kind, block * 512)))
            if kind == "pause":
                await tasks[-1]
        await asyncio.gather(*tasks)
        loop.probe = None
        disk.io.failures.planned.clear()
        if isinstance(disk.leaf, CrashDisk):
            disk.leaf.failures.planned.clear()
        await disk.flush(user)
        await disk.check()
        await disk.close()

    async def _do(self, kind: str, offset: int) -> Any:
        disk, engine = self.disk, self.engine
        assert engine is not None
        user, other = disk.users[0], disk.users[-1]
        memory = IoVec.of(bytearray(700))
        if kind == "pause":
            return await turns(offset // 100)
        if kind in ("flush fails", "write fails"):
            failures = disk.leaf.failures if isinstance(disk.leaf, CrashDisk) else disk.io.failures
            failures.planned.append(kind.split()[0])
            return None
        if kind == "flush by the engine":
            return await engine.flush()
        if kind == "write by the engine":
            return await engine.request(offset, IoVec.of(bytearray(512)), True)
        if kind == "flush":
            return await disk.flush(user)
        if kind == "flush by the other":
            return await disk.flush(other)
        if kind == "write by the other":
            return await disk.write(other, offset, IoVec.of(bytearray(512)))
        if kind == "discard":
            return await disk.discard(user, offset, 1024)
        flags = FUA if kind.startswith("durable") else 0
        if kind.endswith("zero-write"):
            return await disk.write_zeroes(user, offset, 900, True, flags)
        return await disk.write(user, offset, memory, flags)


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("leaf", LEAVES)
@settings(
    max_examples=25 * HUNT,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(script=scripts, write_cache=st.booleans(), seed=st.integers(0, 1 << 30))
def test_no_power_cut_takes_what_was_promised(
    leaf: str,
    layers: str,
    tmp_path: Path,
    script: list[tuple[str, int]],
    write_cache: bool,
    seed: int,
) -> None:
    scenario, choice = Script(tmp_path / "disk"), random.Random(seed)
    run(
        lambda: scenario.perform(leaf, layers, write_cache, script),
        choice.randrange,
    )


@pytest.mark.parametrize("leaf", LEAVES)
@pytest.mark.parametrize(
    "script",
    [
        ["write", "flush", "durable write", "flush"],
        ["write", "flush", "flush", "flush"],
        ["flush fails", "write", "flush", "pause", "flush"],
        ["write by the engine", "flush by the engine", "flush", "flush by the other"],
        ["flush fails", "write by the engine", "flush by the engine", "flush", "pause", "flush"],
        ["write by the engine", "pause", "flush fails", "flush by the engine", "flush"],
        ["durable zero-write", "write", "durable write"],
    ],
    ids=" ".join,
)
def test_no_order_of_a_few_writes_and_flushes_breaks_a_promise(
    leaf: str, script: list[str], tmp_path: Path
) -> None:
    """All that depart from first come, first served once, and some of those that do twice."""
    steps = [(kind, 2) for kind in script]
    explore(lambda: Script(tmp_path / "disk").perform(leaf, "raw", True, steps), limit=60)
