"""A long run in which every byte is verified, while what the engine may do by itself is taken back all the time.

`vhostblk bench --verify` in another process against an export of ours: 4 queues on 2 engine threads, mixed sizes,
flushes, discards, write-zeroes. Meanwhile extents are revoked and mapped again, drained, the write cache goes on and
off, the image grows, others use the disk (disturber.py), and data move (wandering_node.py). All that was read has to be
right, and in the end the statistics have to add up and nothing may be left.

In the suite a case takes as long as it takes to make so many requests and disturbances. VHOSTBLK_LONG=SECONDS makes all
cases together take that long; VHOSTBLK_SEED=NUMBER repeats what was printed.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import eventually
from tests.integration.disturber import Disturber
from tests.integration.wandering_node import WanderingNode
from tests.requirements import require
from vhostblk.block.keyval import parse_options
from vhostblk.daemon import Daemon, DaemonConfig, IOThreadConfig
from vhostblk.export.export import Export
from vhostblk.export.native_path import NativeDataPath
from vhostblk.export.options import parse_export
from vhostblk.testing.daemon_process import VHOSTBLK
from vhostblk.testing.resources import Resources, wait_until_released

_SECONDS = float(os.environ.get("VHOSTBLK_LONG", "0"))
_SEED = int(os.environ.get("VHOSTBLK_SEED", "0")) or (
    time.time_ns() % 1_000_000_000 if _SECONDS else 1
)
_IMAGE = 64 << 20
_SPANS = [1 << 20, 16 << 20]  # a part of the disk, so that requests meet
_QUEUES = 4
_ROUND = 20_000 if _SECONDS else 3_000  # requests of one bench
_LEAST_DISTURBANCES = 60
_TIMEOUT = 200  # seconds for one bench, which gives up by itself if nothing happens

# where the image is, options of the file, and what moves together
_STORAGE = {
    "file": ("/var/tmp", "", "64k"),  # FHS: what is there survives a reboot, so it is no tmpfs
    "threads": ("/var/tmp", ",file.aio=threads", "1M"),
    "tmpfs": ("/dev/shm", "", "64k"),
    "direct": ("/var/tmp", ",file.cache.direct=on", "256k"),
    "pinned": ("/var/tmp", ",file.cache.direct=on", "64k"),
}
_CASES = [(storage, "wandering") for storage in _STORAGE]
_CASES += [(storage, "raw") for storage in ("file", "tmpfs", "direct")]


@dataclass
class Run:
    """A daemon in a thread of this process, and what was done to its export."""

    socket: Path
    export: Export
    disturber: Disturber
    loop: asyncio.AbstractEventLoop
    choice: random.Random
    rounds: int = 0
    requests: int = 0
    verified: int = 0
    commands: list[str] = field(default_factory=list)

    def bench(
        self, options: Sequence[str] = (), span: int = 0, requests: int = _ROUND
    ) -> tuple[int, str, str]:
        """One bench, disturbed; returns its exit status, and what it said.

        Args:
            options: of the bench; none: some.
            span: bytes of the disk that it uses; 0: some.
            requests: until it ends.
        """
        self.disturber.span = span or self.choice.choice(_SPANS)
        self.disturber.pause = self.choice.choice([0, 30, 100])
        words = [*(options or self._options()), "--verify", "--json", "--queues", str(_QUEUES)]
        words += ["--size", str(self.disturber.span), "--requests", str(requests)]
        words += ["--seed", str(self.choice.randrange(1 << 30))]
        command = [*VHOSTBLK, "bench", str(self.socket), *words]
        self.commands.append(" ".join(command[3:]))
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        try:
            disturbing = asyncio.run_coroutine_threadsafe(
                self.disturber.disturb(lambda: process.poll() is not None), self.loop
            )
            out, err = process.communicate(timeout=_TIMEOUT)
            disturbing.result(30)
        finally:
            process.kill()
            process.wait()
        eventually(lambda: self.export._front_end is None, "the front-end is seen off")
        return process.returncode, out, err

    def verified_round(self) -> None:
        """One bench; its data were right, and both sides have counted the same."""
        before = self.export.statistics()
        status, out, err = self.bench()
        assert status == 0, f"{self.story()}\n{err}"
        result: dict[str, Any] = json.loads(out)["result"]
        served = self.export.statistics().since(before)
        # The last pass, which reads every block once more, is not in the result.
        assert served.requests == result["requests"] + result["verified_blocks"], self.story()
        assert served.hits + served.misses == served.requests
        assert served.in_flight == 0
        for name, operation in served.operations.items():
            assert operation.errors == 0
            asked = result["operations"].get(name.replace("_", "-"), {"requests": 0, "bytes": 0})
            again = result["verified_blocks"] if name == "read" else 0
            assert operation.requests == asked["requests"] + again, name
            if not again:
                assert operation.bytes == asked["bytes"], name
        self.rounds += 1
        self.requests += served.requests
        self.verified += result["compared"]

    def _options(self) -> list[str]:
        """Some options of a bench."""
        choose = self.choice
        unit = choose.choice([512, 4096, 4096, 32768])
        pattern = choose.choice(
            [
                "read=45,write=45,flush=1,discard=4,write-zeroes=5",
                "read=30,write=60,discard=5,write-zeroes=5",
                "randrw",
            ]
        )
        words = ["--pattern", pattern]
        words += ["--block-size", f"{unit}-{unit * choose.choice([1, 8, 32])}"]
        words += ["--threads", str(choose.choice([1, 2]))]
        words += ["--depth", str(choose.choice([1, 8, 32]))]
        words += ["--segments", str(choose.choice([1, 1, unit // 512]))]
        words += ["--flush-every", str(choose.choice([100, 1000]))]
        words += ["--wait", choose.choice(["poll", "eventfd", "eventfd"])]
        for option in ("--direct", "--no-event-idx", "--unmap"):
            if choose.random() < 0.3:
                words.append(option)
        return words

    def story(self) -> str:
        """What has happened up to now."""
        served = self.export.statistics()
        kinds = ", ".join(f"{count} {name}" for name, count in self.disturber.done.most_common())
        return (
            f"VHOSTBLK_SEED={_SEED}: {self.rounds} runs, {self.requests} requests,"
            f" {self.verified >> 20} MiB compared; hits {served.hits}, misses {served.misses};"
            f" {kinds}; last: {self.commands[-1] if self.commands else ''}"
        )


@contextmanager
def served(folder: Path, storage: str, graph: str) -> Iterator[Run]:
    """An export as it is in the product, and its disturber."""
    place, options, chunk = _STORAGE[storage]
    with tempfile.TemporaryDirectory(dir=place, prefix="vb-") as images:
        image = Path(images) / "image"
        with image.open("wb") as file:
            file.truncate(_IMAGE)
        top = "d" if graph == "raw" else "inner"
        raw = f"raw,node-name={top},discard=unmap,file.driver=file,file.filename={image}"
        nodes = [f"{raw},offset=1M{options}"]
        if graph != "raw":
            nodes.append(f"wandering,node-name=d,discard=unmap,chunk={chunk},file={top}")
        # With iothread-vq-mapping: queues 0 and 2 on one thread, 1 and 3 on the other.
        mapping = ",".join(f"iothread-vq-mapping.{i}.iothread=io{i}" for i in range(2))
        pinned = ",pin-memory=on" if storage == "pinned" else ""
        export = parse_options(
            f"vhost-user-blk,id=e,node-name=d,writable=on,max-segments=8,num-queues={_QUEUES},"
            f"addr.type=unix,addr.path={folder / 'e'},{mapping}{pinned}",
            "type",
        )
        config = DaemonConfig(
            blockdevs=[parse_options(node, "driver") for node in nodes],
            io_threads=[IOThreadConfig("io0"), IOThreadConfig("io1")],
            exports=[parse_export(export)],
            data_path="native",
        )
        ready = threading.Event()
        daemon: list[Daemon] = []
        loops: list[asyncio.AbstractEventLoop] = []
        failures: list[BaseException] = []

        async def serve() -> None:
            daemon.append(Daemon(config, ready.set))
            daemon[0].graph.drivers.register(WanderingNode)
            loops.append(asyncio.get_running_loop())
            await daemon[0].run()

        def live() -> None:
            try:
                asyncio.run(serve())
            except BaseException as exc:
                failures.append(exc)
                ready.set()

        thread = threading.Thread(target=live)
        thread.start()
        try:
            assert ready.wait(10)
            if failures:
                raise failures[0]
            exported = daemon[0].exports["e"]
            choice = random.Random(f"{_SEED} {storage} {graph}")
            disturber = Disturber(exported, image, choice.randrange(1 << 30))
            yield Run(folder / "e", exported, disturber, loops[0], choice)
        finally:
            if not failures:
                loops[0].call_soon_threadsafe(daemon[0].stop)
            thread.join(30)
        assert not failures, failures


@pytest.mark.timeout(_SECONDS / len(_CASES) + 2 * _TIMEOUT)
@pytest.mark.parametrize(("storage", "graph"), _CASES)
def test_every_byte_is_right_while_extents_come_and_go(
    socket_directory: Path, storage: str, graph: str
) -> None:
    require("engine")
    with served(socket_directory, storage, graph) as run:
        until = time.monotonic() + _SECONDS / len(_CASES)
        run.verified_round()
        # Made at the first use, and kept: threads of pools, above all.
        before = Resources.of()
        run.verified_round()
        while run.disturber.done.total() < _LEAST_DISTURBANCES or time.monotonic() < until:
            run.verified_round()
        _nothing_is_left(before)
        print(f"{storage}, {graph}: {run.story()}")
        statistics = run.export.statistics()
        assert statistics.hits > 0
        assert statistics.misses > 0


def _nothing_is_left(before: Resources) -> None:
    """Threads of pools come and go with the load; everything else is as it was."""
    for thread in ("vhostblk-io", "python", "python3", "pytest"):
        before.threads[thread] += 64
    assert not wait_until_released(before)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("storage", ["tmpfs", "direct"])
def test_revocation_that_takes_nothing_back_is_found(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    """The run above can fail."""
    require("engine")

    async def revoke(path: NativeDataPath, offset: int, length: int) -> None:
        """Says that nobody uses the range."""

    monkeypatch.setattr(NativeDataPath, "revoke", revoke)
    with served(socket_directory, storage, "wandering") as run:
        for _ in range(20):
            status, _, err = run.bench()
            if status != 0:
                break
        assert "wrong data" in err, run.story()


@pytest.mark.timeout(240)
def test_revocation_that_does_not_wait_is_found(
    socket_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine forgets the range at once; what it has in flight there is what the graph has to wait for."""
    require("engine")
    revoke = NativeDataPath.revoke

    async def hurry(path: NativeDataPath, offset: int, length: int) -> None:
        tasks.append(asyncio.ensure_future(revoke(path, offset, length)))
        await asyncio.sleep(0)

    tasks: list[asyncio.Future[None]] = []
    monkeypatch.setattr(NativeDataPath, "revoke", hurry)
    # Large buffered writes of many threads to one file wait for each other, which takes longer than to move a chunk.
    with served(socket_directory, "threads", "wandering") as run:
        run.disturber.only = "moved"
        for _ in range(20):
            status, _, err = run.bench(
                ["--pattern", "randrw", "--block-size", "1M", "--depth", "16"], max(_SPANS)
            )
            if status != 0:
                break
        assert "wrong data" in err, run.story()
