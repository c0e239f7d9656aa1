"""`vhostblk bench` against our daemon and qemu-storage-daemon: figures are sound, and wrong data are found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.daemons import ALL_PATHS, BOTH_PATHS, CAPACITY, Disks, eventually, wait_until_taken
from tests.requirements import require
from vhostblk.client.bench.options import PATTERNS, BenchOptions, parse_pattern
from vhostblk.client.bench.result import BenchResult
from vhostblk.client.bench.run import Progress, bench
from vhostblk.errors import ConfigError, PeerError
from vhostblk.native import load
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess

pytestmark = pytest.mark.skipif(not load.available(), reason="the generator is not built")

QUICK = BenchOptions(duration=0.3, ramp=0.0, depth=8)
ONCE = replace(QUICK, once=True, verify=True)


def run(path: Path, options: BenchOptions = QUICK, **changes: Any) -> BenchResult:
    return bench(str(path), replace(options, **changes))


# ---------------------------------------------------------------- what is counted


@BOTH_PATHS
@pytest.mark.parametrize("sleep", [False, True], ids=["polling", "sleeping"])
@pytest.mark.parametrize("indirect", [False, True], ids=["direct", "indirect"])
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_every_request_is_counted_once(
    disks: Disks, sleep: bool, indirect: bool, packed: bool
) -> None:
    result = run(
        disks.socket("disk"),
        sleep=sleep,
        indirect=indirect,
        packed=packed,
        pattern=parse_pattern("randrw", 70),
        flush_every=100,
        requests=2000,
        queues=2,
        threads=2,
        segments=2,
    )
    operations = result.operations
    assert result.requests == 2000 == sum(op.requests for op in operations.values())
    assert operations["read"].requests > operations["write"].requests > 0
    assert operations["flush"].requests >= operations["write"].requests // 100 - 2
    assert result.latency.bytes == (result.requests - operations["flush"].requests) * 4096
    assert 0 < result.latency.percentiles_us["50"] <= result.latency.max_us
    assert result.iops == pytest.approx(2000 / result.seconds)
    assert result.client_busy_us > 0
    assert result.backend_cpu_us
    assert result.kicks_per_request <= 1


@BOTH_PATHS
def test_runs_for_as_long_as_it_is_told_and_tells_how_far_it_is(disks: Disks) -> None:
    told: list[Progress] = []
    result = bench(str(disks.socket("disk")), replace(QUICK, duration=1.2, ramp=0.6), told.append)
    assert 1.19 <= result.seconds < 5  # two clocks are compared, and differ by parts of a thousand
    assert told[0].phase == "ramp"
    assert {p.phase for p in told} == {"ramp", "run"}
    assert result.samples


@BOTH_PATHS
def test_rate_is_kept(disks: Disks) -> None:
    result = run(
        disks.socket("disk"), rate=2000, requests=1000, sleep=True, pattern=PATTERNS["randwrite"]
    )
    assert result.seconds >= 0.45


@BOTH_PATHS
def test_slow_disk_shows_its_latency(disks: Disks) -> None:
    result = run(disks.socket("slow"), requests=8, depth=1, sleep=True)
    assert result.latency.percentiles_us["50"] >= 49_000
    assert 0 < result.kicks_per_request <= 1  # it may still be looking at the ring
    assert result.calls_per_request >= 1
    assert result.client_cpu_us < 5000


# ---------------------------------------------------------------- whether data are right


@ALL_PATHS
def test_verified_mixture_of_everything(disks: Disks) -> None:
    result = run(
        disks.socket("disk"),
        pattern=parse_pattern("read=40,write=40,discard=5,write-zeroes=5,flush=10"),
        block_min=512,
        block_max=32768,
        queues=4,
        threads=2,
        requests=3000,
        verify=True,
        unmap=True,
    )
    assert result.compared
    assert result.verified_blocks


@BOTH_PATHS
def test_corrupted_block_is_found_by_another_run(disks: Disks) -> None:
    path, image = disks.socket("disk"), disks.image("disk")
    run(path, ONCE, pattern=PATTERNS["write"])
    assert run(path, ONCE, pattern=PATTERNS["read"], block_max=65536).compared == CAPACITY
    with image.open("r+b") as file:
        file.seek(5 * 4096 + 1000)
        byte = file.read(1)[0]
        file.seek(5 * 4096 + 1000)
        file.write(bytes([byte ^ 1]))
    complaint = (
        f"wrong data at offset {5 * 4096 + 512}: expected .*, got other data of that offset"
        f".*; byte 488 is {byte ^ 1:#04x}, not {byte:#04x}"
    )
    with pytest.raises(PeerError, match=complaint):
        run(path, ONCE, pattern=PATTERNS["read"], queues=3)


@BOTH_PATHS
def test_block_in_the_wrong_place_is_found(disks: Disks) -> None:
    path, image = disks.socket("disk"), disks.image("disk")
    run(path, ONCE, pattern=PATTERNS["write"])
    with image.open("r+b") as file:
        file.seek(8192)
        block = file.read(4096)
        file.seek(12288)
        file.write(block)
    with pytest.raises(PeerError, match=r"at offset 12288: .* got what belongs to offset 8192"):
        run(path, ONCE, pattern=PATTERNS["read"])


@BOTH_PATHS
def test_block_that_was_never_written_is_found(disks: Disks) -> None:
    path, image = disks.socket("disk"), disks.image("disk")
    image.write_bytes(bytes(CAPACITY))
    run(path, ONCE, pattern=PATTERNS["write"], size=1 << 20)
    assert run(path, ONCE, pattern=PATTERNS["read"], size=1 << 20).compared == 1 << 20
    with pytest.raises(PeerError, match=f"at offset {1 << 20}: .* got zeroes"):
        run(path, ONCE, pattern=PATTERNS["read"], depth=1)


@BOTH_PATHS
def test_stays_in_its_range(disks: Disks) -> None:
    image = disks.image("disk")
    image.write_bytes(b"\xaa" * CAPACITY)
    run(
        disks.socket("disk"), pattern=PATTERNS["randwrite"], offset=65536, size=131072, requests=500
    )
    content = image.read_bytes()
    assert set(content[:65536] + content[65536 + 131072 :]) == {0xAA}
    assert set(content[65536 : 65536 + 131072]) != {0xAA}


# ---------------------------------------------------------------- what cannot be done


@BOTH_PATHS
@pytest.mark.parametrize(
    ("export", "changes", "message"),
    [
        ("read-only", {"pattern": PATTERNS["randwrite"]}, "the disk is read-only"),
        ("disk", {"offset": CAPACITY}, "larger than the range"),
        ("disk", {"size": CAPACITY * 2}, f"the disk has {CAPACITY} bytes"),
        ("disk", {"segments": 1000, "block_min": 1 << 20, "block_max": 1 << 20}, "segments 1000"),
    ],
)
def test_what_the_disk_cannot_do_is_refused(
    disks: Disks, export: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run(disks.socket(export), **changes)


def command(*words: str | Path) -> list[str]:
    return [*VHOSTBLK, "bench", *map(str, words)]


@pytest.fixture
def daemon(socket_directory: Path) -> Iterator[DaemonProcess]:
    """A daemon that a test may kill."""
    image = socket_directory / "disk.img"
    image.write_bytes(bytes(CAPACITY))
    path = socket_directory / "sock"
    process = DaemonProcess([*VHOSTBLK, "serve", str(image), "--socket", str(path)], sockets=[path])
    process.start()
    yield process
    process.close(check=False)


@pytest.mark.parametrize("wait", ["poll", "eventfd"])
def test_back_end_that_dies_ends_the_run_with_one_line(daemon: DaemonProcess, wait: str) -> None:
    words = command(daemon.sockets[0], "--duration", "60", "--ramp", "0", "--wait", wait)
    client = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until_taken(daemon, 1000)
        os.kill(daemon.pid, signal.SIGKILL)
        began = time.monotonic()
        out, err = client.communicate(timeout=20)
    finally:
        client.kill()
        client.wait()
    assert time.monotonic() - began < 10
    assert (client.returncode, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "the back-end left with" in err


def test_back_end_that_hangs_ends_the_run_with_one_line(daemon: DaemonProcess) -> None:
    words = command(daemon.sockets[0], "--duration", "60", "--ramp", "0", "--timeout", "1")
    client = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        wait_until_taken(daemon, 1000)
        os.kill(daemon.pid, signal.SIGSTOP)
        out, err = client.communicate(timeout=30)
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
        client.kill()
        client.wait()
    assert (client.returncode, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "no request has finished for 1 s" in err


def test_json_and_comparison_on_the_command_line(daemon: DaemonProcess) -> None:
    path = daemon.sockets[0]
    words = ["--compare", path, "--runs", "2", "--requests", "500", "--json", "--seed", "5"]
    done = subprocess.run(
        command(path, *words), capture_output=True, text=True, timeout=60, check=True
    )
    read = json.loads(done.stdout)
    assert len(read["first"]["runs"]) == len(read["second"]["runs"]) == 2
    assert read["options"]["seed"] == 5
    assert read["ratios"]["iops"] > 0
    assert done.stderr == ""


def test_self_test_says_what_the_generator_costs() -> None:
    done = subprocess.run(
        command("--self-test", "--json"), capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["self_test"]
    assert 0 < found["busy_us"] < 5
    assert found["iops"] > 1000


# ---------------------------------------------------------------- somebody else's back-end


@pytest.fixture
def qemu(socket_directory: Path) -> Iterator[tuple[Path, Path]]:
    """Socket and image of qemu-storage-daemon."""
    program = require("qemu-storage-daemon", group="qemu")
    image, path, started = (socket_directory / name for name in ("q.img", "q.sock", "q.pid"))
    image.write_bytes(bytes(CAPACITY))
    process = subprocess.Popen(
        [
            program,
            "--blockdev",
            f"driver=file,node-name=disk,filename={image},discard=unmap,locking=off",
            "--export",
            f"type=vhost-user-blk,id=e,addr.type=unix,addr.path={path},node-name=disk,writable=on,num-queues=4",
            "--pidfile",
            str(started),
        ]
    )
    try:
        eventually(lambda: started.exists() or process.poll() is not None, "qemu-storage-daemon")
        yield path, image
    finally:
        process.kill()
        process.wait(10)


@pytest.mark.parametrize("indirect", [True, False], ids=["indirect", "direct"])
def test_qemu_storage_daemon_is_measured_and_verified(
    qemu: tuple[Path, Path], indirect: bool
) -> None:
    path, image = qemu
    mixed = run(
        path,
        pattern=parse_pattern("read=40,write=40,discard=5,write-zeroes=5,flush=10"),
        block_max=16384,
        queues=4,
        requests=2000,
        verify=True,
        indirect=indirect,
    )
    assert mixed.requests == 2000
    assert mixed.verified_blocks
    assert run(path, sleep=True, requests=500, indirect=indirect, depth=1).calls_per_request > 0.5
    run(path, ONCE, pattern=PATTERNS["write"])
    with image.open("r+b") as file:
        file.seek(4096)
        file.write(b"damage")
    with pytest.raises(PeerError, match="wrong data at offset 4096"):
        run(path, ONCE, pattern=PATTERNS["read"])


def test_comparison_of_two_daemons_has_ratios(
    qemu: tuple[Path, Path], daemon: DaemonProcess
) -> None:
    done = subprocess.run(
        command(daemon.sockets[0], "--compare", qemu[0], "--runs", "3", "--requests", "300"),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = done.stdout.splitlines()
    assert lines[0] == f"A = {daemon.sockets[0]}"
    assert lines[-1].startswith("A / B")
    assert len(lines) == 3 + 1 + 6 + 3


def test_runs_as_a_module_too() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vhostblk", "bench", "--help"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    assert "--compare SOCKET2" in done.stdout
