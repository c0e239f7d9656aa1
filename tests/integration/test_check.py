"""`vhostblk check`: ours passes all of it, a stranger is checked to the end, every fault is found.

The command is run as users do, against daemons that are processes of their own.
"""

from __future__ import annotations

import json
import os
import random
import re
import socket
import struct
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.integration.faulty_daemon import FAULTS
from tests.requirements import require
from vhostblk.client.conformance.registry import ALL_CHECKS
from vhostblk.testing.daemon_process import VHOSTBLK, DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.vhost.message import Request

SIZE = 32 << 20
ROOT = Path(__file__).resolve().parents[2]
ALL = ("--destructive", "--hostile", "--strict")
# On a disk that offers everything that ours does: no SIZE_MAX, and not read-only.
NOT_HERE = {"config.size-max", "request.longest-segment", "request.read-only-refuses"}


def check(
    target: Path | str, *options: str, status: int | None = 0, timeout: float = 100
) -> dict[str, Any]:
    """Run the command, compare its exit status, give its report."""
    done, report = answer(target, *options, timeout=timeout)
    if status is not None:
        assert done.returncode == status, f"{done.stderr}\n{outcomes(report, 'fail', 'warn')}"
    assert done.stderr == ""
    return report


def answer(
    target: Path | str, *options: str, timeout: float = 100
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the command, give what came of it, and its report."""
    done = subprocess.run(
        [*VHOSTBLK, "check", str(target), "--json", *options],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return done, json.loads(done.stdout) if done.stdout else {}


def outcomes(report: dict[str, Any], *wanted: str) -> dict[str, str]:
    """Ids of checks with these outcomes, and their details."""
    return {
        row["id"]: row["detail"] for row in report.get("checks", ()) if row["outcome"] in wanted
    }


def export(folder: Path, node: str, options: str = "writable=on,max-segments=32") -> list[str]:
    """Options of a storage daemon with one disk at `folder / "s"`."""
    return [
        *("--blockdev", f"node-name=d,{node}"),
        *("--export", f"type=vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path={folder / 's'},{options}"),
    ]  # fmt: skip


def image(folder: Path, size: int = SIZE) -> str:
    """A file node on a new image of random bytes at its start."""
    path = folder / "disk.img"
    path.write_bytes(random.Random(5).randbytes(64 << 10))
    os.truncate(path, size)
    return f"driver=file,filename={path},discard=unmap"


# ---------------------------------------------------------------- ours

MEMORY = f"driver=memory,size={SIZE},discard=unmap"


@pytest.mark.parametrize(
    ("node", "data_path"), [("file", "native"), ("file", "python"), ("memory", "native")]
)
def test_ours_passes_every_check(
    storage_daemon: DaemonStarter, socket_directory: Path, data_path: str, node: str
) -> None:
    driver = image(socket_directory) if node == "file" else MEMORY
    target = socket_directory / "s"
    daemon = storage_daemon(
        "--data-path", data_path, *export(socket_directory, driver), sockets=[target]
    )
    report = check(target, *ALL)
    assert outcomes(report, "fail", "warn") == {}
    assert outcomes(report, "skip").keys() == NOT_HERE
    assert len(outcomes(report, "ok")) == len(ALL_CHECKS) - len(NOT_HERE)
    assert daemon.status is None


# Shape of the disk: options of the node, of the export; checks that are skipped, besides NOT_HERE, and why.
SHAPES: dict[str, tuple[str, str, dict[str, str]]] = {
    "read-only": (
        ",read-only=on",
        "writable=off",
        {"write.reads-back": "the disk is read-only", "zeroes.works": "needs WRITE_ZEROES"},
    ),
    "blocks of 4096": (
        "",
        "writable=on,logical-block-size=4096",
        {"framing.odd-pieces": "222 segments, seg_max is 126"},
    ),
    "write-through": ("", "writable=on,writethrough=on", {}),
    "one queue": (
        "",
        "writable=on,num-queues=1",
        {"queues.at-once": "needs 2 queues"},
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_ours_passes_in_other_shapes(
    storage_daemon: DaemonStarter, socket_directory: Path, shape: str
) -> None:
    node, options, reasons = SHAPES[shape]
    target = socket_directory / "s"
    storage_daemon(
        *export(socket_directory, image(socket_directory) + node, options), sockets=[target]
    )
    areas = ("config", "request", "write", "discard", "zeroes", "framing", "indirect", "queues.a*")
    only = [word for area in areas for word in ("--only", area)]
    report = check(target, "--destructive", "--strict", *only)
    assert outcomes(report, "fail", "warn") == {}
    skipped = outcomes(report, "skip")
    assert {name: skipped[name] for name in reasons} == reasons
    was_refused = "request.read-only-refuses" in outcomes(report, "ok")
    assert was_refused == (shape == "read-only")


def test_without_destructive_nothing_is_written(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    node = image(socket_directory)
    target = socket_directory / "s"
    before = (socket_directory / "disk.img").read_bytes()
    storage_daemon(*export(socket_directory, node), sockets=[target])
    report = check(target, "--hostile")
    assert (socket_directory / "disk.img").read_bytes() == before
    skipped = outcomes(report, "skip")
    writing = {row.id for row in ALL_CHECKS if row.writes}
    assert writing <= skipped.keys()
    assert {skipped[name] for name in writing} == {"only with --destructive", "needs RO"}


def test_destructive_writes_what_it_says_and_nothing_else(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    node = image(socket_directory)
    marked = range(16 << 20, SIZE - 4096, 4096)
    with (socket_directory / "disk.img").open("r+b") as disk:
        for offset in marked:
            disk.seek(offset)
            disk.write(offset.to_bytes(8, "little") * 512)
    target = socket_directory / "s"
    storage_daemon(*export(socket_directory, node), sockets=[target])
    check(target, "--destructive")
    content = (socket_directory / "disk.img").read_bytes()
    for offset in marked:
        assert content[offset : offset + 4096] == offset.to_bytes(8, "little") * 512


# ---------------------------------------------------------------- another's

QSD_FAILS = {
    "config.fields-by-themselves",
    "config.size-max",
    "request.get-id",
    "indirect.behind-direct",
    "state.no-kick-fd",
}
"""Of qemu-storage-daemon 7.2 these are known; other versions may be better."""


def test_qemu_storage_daemon_is_checked_to_the_end(socket_directory: Path) -> None:
    program = require("qemu-storage-daemon", group="qemu")
    command = [program, *export(socket_directory, image(socket_directory), "writable=on")]
    target = socket_directory / "s"
    with DaemonProcess([*command, "--object", "iothread,id=unused"], sockets=[target]) as qsd:
        report = check(target, "--destructive", "--timeout", "2", status=None)
        assert qsd.status is None
        assert report["summary"]["not_run"] == 0
        assert len(report["checks"]) == len(ALL_CHECKS)
        failed = outcomes(report, "fail")
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)
        if "version 7.2" in version.stdout:
            assert failed.keys() >= QSD_FAILS
        # Whatever it fails: these are what guests live by.
        for name in ("request.read-first", "write.reads-back", "queues.integrity", "ring.size-128"):
            assert name in outcomes(report, "ok")


# ---------------------------------------------------------------- faulty ones

FOUND: dict[str, tuple[set[str], set[str]]] = {
    # fault: (checks that fail, and may be all that run besides those that pass; checks that must pass nevertheless)
    "used_length_too_long": (
        {"request.used-length-bound", "request.used-length-exact", "write.used-length"},
        {"request.read-first", "write.reads-back"},
    ),
    "used_length_forgotten": ({"request.used-length-exact"}, {"request.used-length-bound"}),
    "calls_lost": (
        {"notify.no-call-lost", "notify.no-call-lost-flags"},
        {"notify.kick-when-asked", "notify.event-not-reached"},
    ),
    "calls_never_suppressed": (
        {"notify.event-not-reached", "notify.flag-set"},
        {"notify.no-call-lost", "notify.event-reached"},
    ),
    "flag_honoured_with_event_idx": ({"notify.event-ignores-flag"}, {"notify.flag-set"}),
    "kicks_not_asked_for": (
        {"notify.kick-when-asked", "notify.idle-asks-for-kick"},
        {"notify.event-in-a-batch"},
    ),
    "one_status_for_all_failures": (
        {"request.unknown-type", "zeroes.unknown-flags", "discard.unmap-flag"},
        {"request.read-beyond", "discard.beyond"},
    ),
    "last_sector_refused": ({"request.read-last", "write.last-block"}, {"request.read-first"}),
    "writes_displaced": ({"write.reads-back", "write.neighbours"}, {"request.read-first"}),
    "zeroes_not_written": ({"zeroes.works", "zeroes.unmap"}, {"zeroes.beyond", "write.reads-back"}),
    "base_one_too_far": ({"state.base", "state.stop-in-flight"}, {"state.disable-enable"}),
    "disabled_rings_served": (
        {"state.disabled-takes-nothing", "state.disabled-has-no-effect"},
        {"state.base"},
    ),
    "cache_mode_ignored": ({"config.writeback-toggled"}, {"config.writeback-initial"}),
    "config_offset_ignored": ({"config.fields-by-themselves"}, {"config.whole"}),
    "status_forgotten": ({"device.status"}, {"device.status-zero", "device.state"}),
    "packed_wrap_counter_forgotten": ({"packed.restart"}, {"packed.reads", "state.base"}),
}


def start_faulty(starter: DaemonStarter, fault: str, folder: Path) -> None:
    starter(
        *export(folder, MEMORY),
        command=[VHOSTBLK[0], "-m", "tests.integration.faulty_daemon", fault, "storage-daemon",
                 "--data-path", "python"],
        sockets=[folder / "s"],
        environment={"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.parametrize("fault", FOUND)
def test_fault_is_found_by_the_checks_that_are_meant_for_it(
    storage_daemon: DaemonStarter, socket_directory: Path, fault: str
) -> None:
    start_faulty(storage_daemon, fault, socket_directory)
    found, innocent = FOUND[fault]
    patterns = [word for name in sorted(found | innocent) for word in ("--only", name)]
    # A busy machine may need more than half a second for an answer, also to what is offered.
    for timeout in ("0.5", "5"):
        options = ("--destructive", "--strict", "--timeout", timeout, *patterns)
        done, report = answer(socket_directory / "s", *options)
        if outcomes(report, "ok").keys() == innocent:
            break
    assert (done.returncode, done.stderr) == (1, "")
    assert outcomes(report, "fail", "warn").keys() == found
    assert outcomes(report, "ok").keys() == innocent


def test_every_fault_is_in_the_table() -> None:
    assert FOUND.keys() | {"dies_of_a_ring_of_3"} == FAULTS.keys()


def test_the_run_ends_when_the_back_end_is_gone(socket_directory: Path) -> None:
    target = socket_directory / "s"
    command = [VHOSTBLK[0], "-m", "tests.integration.faulty_daemon", "dies_of_a_ring_of_3"]
    process = DaemonProcess(
        [*command, "storage-daemon", "--data-path", "python", *export(socket_directory, MEMORY)],
        sockets=[target],
        environment={"PYTHONPATH": str(ROOT)},
    )
    process.start()
    try:
        options = ("--hostile", "--only", "front-end.size-*")
        report = check(target, *options, status=1)
        assert [row["outcome"] for row in report["checks"]] == ["ok", "fail"]
        last = report["checks"][-1]
        assert last["id"] == "front-end.size-3"
        assert last["detail"].startswith("back end gone: ")
        assert report["summary"]["not_run"] == 2
        assert process.wait() == 1
    finally:
        process.close(check=False)


# ---------------------------------------------------------------- the command


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*VHOSTBLK, "check", *words], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_back_end_that_is_not_there_is_exit_status_2(socket_directory: Path) -> None:
    for missing in (socket_directory / "none", socket_directory):
        done = run(str(missing))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"vhostblk: {missing}: ")
        assert done.stderr.count("\n") == 1


def test_a_listener_that_does_not_answer_is_exit_status_2(socket_directory: Path) -> None:
    path = socket_directory / "silent"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen()
        done = run(str(path), "--timeout", "0.1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "timed out" in done.stderr


def test_a_back_end_that_does_not_say_in_time_what_it_offers_has_not_passed(
    socket_directory: Path,
) -> None:
    path = socket_directory / "slow"

    def answer_one_question(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            header = connection.recv(12)
            assert header[:4] == Request.GET_FEATURES.to_bytes(4, "little")
            features = 1 << 30 | 1 << 32  # there are protocol features, and VIRTIO 1
            connection.sendall(header[:4] + struct.pack("<IIQ", 5, 8, features))
            while connection.recv(4096):
                pass

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor(1) as pool:
        listener.bind(os.fspath(path))
        listener.listen()
        answering = pool.submit(answer_one_question, listener)
        done = run(str(path), "--timeout", "0.1", "--only", "packed.*")
        answering.result()
    assert done.returncode == 2
    assert re.search("^problem .*timed out", done.stdout, re.MULTILINE)
    assert re.search(
        r"^0 passed, 0 failed, 0 warnings, [1-9]\d* skipped", done.stdout, re.MULTILINE
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["s", "--timeout", "0"], "--timeout: '0' is not a number of seconds from 0.01 to 3600"),
        (["s", "--timeout", "nan"], "--timeout: 'nan' is not a number of seconds"),
        (["s", "--only", "nothing.*"], "--only, --skip: no check is left"),
        ([], "a SOCKET is needed"),
    ],
)
def test_wrong_options_are_exit_status_1(words: Sequence[str], complaint: str) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"vhostblk: {complaint}")


def test_list_names_every_check_without_a_back_end() -> None:
    done = run("--list")
    assert done.returncode == 0
    assert [line.split()[0] for line in done.stdout.splitlines()] == [row.id for row in ALL_CHECKS]
    rows = json.loads(run("--list", "--json").stdout)
    assert {row["id"] for row in rows if row["hostile"]} == {
        row.id for row in ALL_CHECKS if row.hostile
    }


def test_text_has_the_offer_a_line_for_each_check_and_a_summary(
    storage_daemon: DaemonStarter, socket_directory: Path
) -> None:
    target = socket_directory / "s"
    storage_daemon(*export(socket_directory, MEMORY), sockets=[target])
    done = run(str(target), "--only", "config", "--only", "write")
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].startswith("features ")
    assert f"capacity           {SIZE} bytes" in lines
    assert any("seg_max 126" in line and "writeback 1" in line for line in lines[:6])
    checks = [line.split() for line in lines if line.startswith(("ok ", "skip ", "FAIL ", "warn "))]
    assert ["skip", "config.size-max"] in [words[:2] for words in checks]
    assert ["ok", "config.whole"] in [words[:2] for words in checks]
    assert not any(words[1].startswith("write.") for words in checks)
    writing = sum(row.writes for row in ALL_CHECKS if row.area in ("config", "write"))
    assert lines[-1] == f"{writing} of the skipped need --destructive"
    assert lines[-2].endswith(f"0 failed, 0 warnings, {writing + 1} skipped")
