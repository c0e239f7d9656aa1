"""The reports beside the targets: cases that can be run, options, groups of a profile."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.bench.__main__ import build_parser, conditions, main, reports_of, settings_of
from tests.bench.measure import Settings
from tests.bench.profile import GROUPS, PROFILED, Sample, group_of, parse_report, shares
from tests.bench.rows import Fio
from tests.bench.scaling import (
    DEPTHS,
    SECTIONS,
    QueueCase,
    SizeCase,
    queue_cases,
    size_cases,
)
from tests.bench.servers import QEMU, Files, Server, command_of, fio_command
from tests.bench.short_runs import SECONDS, run_shortly
from tests.requirements import require
from vhostblk.client.bench.options import BenchOptions
from vhostblk.native import load


@pytest.mark.parametrize("processors", [2, 4, 64])
def test_queue_cases_can_be_run(processors: int) -> None:
    for case in queue_cases(processors):
        case.options.check()
        assert case.engine <= case.queues


def test_client_polls_only_with_a_processor_for_each_thread() -> None:
    assert {case.client for case in queue_cases(2) if case.polls} == {1}
    assert all(case.polls for case in queue_cases(4))


def test_second_engine_thread_is_compared_with_one_that_the_same_clients_ask() -> None:
    cases = queue_cases(2)
    second = [case for case in cases if case.engine == 2]
    assert second
    for case in second:
        assert QueueCase(case.queues, 1, case.client, case.polls) in cases


@pytest.mark.parametrize("case", size_cases(), ids=lambda case: case.title)
def test_size_cases_can_be_run(case: SizeCase) -> None:
    case.options.check()
    assert (case.options.block_min, case.options.block_max) == (case.block, case.block)


def test_title_of_a_size_tells_its_segments() -> None:
    assert SizeCase("read", 1 << 20, 16).title == "read 1 MiB, 16 segments"
    assert SizeCase("write", 128 << 10, 1).title == "write 128 KiB"


def test_depths_double_up_to_256() -> None:
    assert DEPTHS == (1, 2, 4, 8, 16, 32, 64, 128, 256)
    for depth in DEPTHS:
        BenchOptions(depth=depth).check()


def test_two_iothreads_are_mapped_to_queues(tmp_path: Path) -> None:
    words = command_of(Server("ours", 2, 8), "null", Files(tmp_path, 1), Path("s"), aio="io_uring")
    (export,) = [word for word in words if word.startswith("type=vhost-user-blk")]
    assert "iothread-vq-mapping.0.iothread=t0,iothread-vq-mapping.1.iothread=t1" in export
    assert "num-queues=8" in export
    assert ",iothread=" not in export
    assert [word for word in words if word.startswith("iothread,id=")] == [
        "iothread,id=t0,poll-max-ns=32768",
        "iothread,id=t1,poll-max-ns=32768",
    ]


def test_qemu_storage_daemon_gets_what_it_knows(tmp_path: Path) -> None:
    require("qemu-storage-daemon", group="qemu")
    words = command_of(QEMU, "null", Files(tmp_path, 1), Path("s"), aio="io_uring")
    assert not [word for word in words if "vq-mapping" in word or "pin-memory" in word]


def test_fio_leaves_the_page_cache_as_it_is_or_goes_around_it() -> None:
    cached = fio_command(Fio("psync", "write", 1 << 20), Path("f"), 1 << 30, 1, 2)
    assert {"--direct=0", "--invalidate=0", "--bs=1048576", "--rw=write"} <= set(cached)
    direct = fio_command(Fio("io_uring", "randread"), Path("f"), 1 << 30, 1, 2)
    assert {"--direct=1", "--registerfiles", "--fixedbufs", "--iodepth=32"} <= set(direct)


@pytest.mark.parametrize(
    ("words", "reports"),
    [
        ([], ["targets", "qcow2"]),
        (["--scaling"], ["scaling"]),
        (["--profile", "--scaling"], ["scaling", "profile"]),
        (["--write-docs"], ["targets", "scaling", "profile", "python", "qcow2"]),
        (["--write-docs", "--scaling"], ["scaling"]),
    ],
)
def test_reports_are_those_that_are_asked_for(words: list[str], reports: list[str]) -> None:
    assert reports_of(build_parser().parse_args(words)) == reports


def test_quick_is_shorter_and_what_is_said_counts() -> None:
    def settings(*words: str) -> Settings:
        return settings_of(build_parser().parse_args(words), "scaling")

    assert settings("--quick").duration < settings().duration
    assert settings("--quick").runs < settings().runs
    assert settings("--quick", "--runs", "7", "--duration", "2").runs == 7
    assert settings("--quick", "--runs", "7", "--duration", "2").duration == 2


def test_conditions_tell_real_time_priority_and_short_runs_but_no_names() -> None:
    require("qemu-storage-daemon", group="qemu")
    plain = conditions(Settings(), "scaling")
    assert "real-time" not in plain
    assert "rough" not in plain
    assert "real-time priority" in conditions(Settings(realtime=True), "scaling")
    assert "rough" in conditions(Settings(quick=True), "scaling")
    assert os.uname().nodename not in plain
    assert re.search(r"Linux [\d.]+;", plain)


@pytest.mark.parametrize(
    "words",
    [["--only", "nonsense"], ["--scaling", "--only", "null"], ["--write-docs", "--only", "null"]],
)
def test_contradictions_are_found_before_anything_is_measured(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    assert "--only" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("dso", "function", "group"),
    [
        ("_engine.abi3.so", "virtqueue_pop", "own code"),
        ("qemu-storage-daemon", "aio_poll", "own code"),
        ("[kernel.kallsyms]", "virtqueue_add_split", "device"),
        ("[kernel.kallsyms]", "iowrite16", "device"),
        ("[kernel.kallsyms]", "_copy_to_iter", "copy"),
        ("[kernel.kallsyms]", "copy_folio_from_iter_atomic", "copy"),
        ("libc.so.6", "__memmove_avx_unaligned_erms", "copy"),
        ("[kernel.kallsyms]", "io_submit_sqes", "io_uring"),
        ("[kernel.kallsyms]", "xas_load", "page cache, file system"),
        ("[kernel.kallsyms]", "ext4_block_write_begin", "page cache, file system"),
        ("[kernel.kallsyms]", "do_syscall_64", "system call"),
        ("libc.so.6", "preadv64v2", "system call"),
        ("[kernel.kallsyms]", "finish_task_switch", "sleeping, waking"),
        ("[kernel.kallsyms]", "eventfd_write", "sleeping, waking"),
        ("[kernel.kallsyms]", "mystery", "other"),
    ],
)
def test_function_belongs_to_its_group(dso: str, function: str, group: str) -> None:
    assert group_of(Sample(1, dso, function)) == group


def test_shares_add_up_and_the_ring_is_a_part_of_own_code() -> None:
    found = shares(
        [
            Sample(3, "_engine.abi3.so", "virtqueue_pop"),
            Sample(1, "_engine.abi3.so", "thread_main"),
            Sample(4, "[kernel.kallsyms]", "_copy_to_iter"),
        ]
    )
    assert found["own code"] == 0.5
    assert found["ring"] == 0.375
    assert sum(found.values()) - found["ring"] == pytest.approx(1)
    assert set(found) == {"own code", "ring", "other", *(name for name, _ in GROUPS)}


def test_report_of_perf_is_read_and_clones_are_one_function() -> None:
    text = "# comment\n 205 ;[kernel.kallsyms];[k] finish_task_switch.isra.0\n\n26;_engine.abi3.so  ;[.] pop\n"
    assert parse_report(text) == [
        Sample(205, "[kernel.kallsyms]", "finish_task_switch"),
        Sample(26, "_engine.abi3.so", "pop"),
    ]


def test_nothing_sampled_is_no_division_by_zero() -> None:
    assert set(shares([]).values()) == {0}


def test_what_is_profiled_can_be_run() -> None:
    for what in PROFILED.values():
        what.options.check()


@pytest.mark.skipif(not load.available(), reason="the generator is not built")
@pytest.mark.timeout(2 * SECONDS)
def test_idle_guests_cost_our_daemon_nothing(tmp_path: Path) -> None:
    require("qemu-storage-daemon", group="qemu")
    words = ["--scaling", "--quick", "--runs", "1", "--folder", str(tmp_path)]
    words += ["--only", "idle-clients", "--only", "depth-null", "--csv", str(tmp_path / "x.csv")]
    done = run_shortly("tests.bench", *words)
    assert (done.returncode, done.stderr) == (0, "")
    idle = re.findall(r"idle-clients-\S+: ours (\d+), ours-2 (\d+)", done.stdout)
    assert idle[:4] == [("0", "0")] * 4  # null-co, tmpfs
    # Where a read had to wait for extents, io_uring has made a worker, which looks around every five seconds.
    assert len(idle) == 6
    assert all(int(ns) < 50_000 for spent in idle[4:] for ns in spent)
    lines = (tmp_path / "x.csv").read_text().splitlines()
    assert {line.split(",")[0] for line in lines if line.startswith("depth")} == {
        f"depth-null-{depth}" for depth in DEPTHS
    }
    assert set(SECTIONS) > {"idle-clients", "depth-null"}
