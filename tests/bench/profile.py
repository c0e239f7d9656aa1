"""What bounds a row: where the daemon spends its CPU time, by perf(1).

The daemon is sampled by its CPU clock (`perf record -e cpu-clock -F 2000`), which works also in virtual machines
without hardware counters. Such samples are taken when the timer's interrupt is let in: code of the kernel that runs
with interrupts off is seen where it turns them on again. Samples are grouped by the names of functions; what the
patterns below do not know is "other". Functions that the compiler or the kernel's build inlined count for their
callers.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.bench.measure import Measure, Metrics
from tests.bench.rows import ROWS, Disk
from tests.bench.scaling import SizeCase
from tests.bench.servers import BOTH, Daemon, give_up
from tests.bench.tables import Table
from vhostblk.client.bench.options import BenchOptions

__all__ = [
    "GROUPS",
    "PROFILED",
    "Sample",
    "group_of",
    "measure_profiles",
    "need_perf",
    "parse_report",
    "shares",
]

_FREQUENCY = 2000
_TOP = 6
_OWN = ("_engine", "qemu-storage-daemon", "python")
_RING = re.compile(r"^(virtqueue|vring|queue|request|blk|show_completions|vu_)_?|_virtqueue_")

GROUPS: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (name, re.compile(pattern))
    for name, pattern in (
        (
            "copy",
            r"^_?copy_(to|from)_iter|copy_page_(to|from)_iter|copy_folio|rep_movs|copy_user|^__?mem(cpy|move|set)"
            r"|copy_mc|clear_page|fault_in_|shmem_copy",
        ),
        ("io_uring", r"^_*(io_|iou_|liburing|io_uring)"),
        (
            "device",
            r"blk_|^_*bio_|submit_bio|virtblk|virtqueue_|virtio|vring_|vp_|nvme|scsi|sbitmap|^dm_|elv_|dd_|plug|mempool"
            r"|dma_|sg_|iowrite|_dio_|ext4_file_read|gup_|pin_user|unpin_",
        ),
        (
            "page cache, file system",
            r"filemap|folio|^_*xa[_s]|shmem|page_cache|mark_page|generic_(file|perform|write|update)|balance_dirty|ext4|jbd2"
            r"|^_*vfs_|rw_verify|security_|fsnotify|file_(update|remove|modified|accessed)|touch_atime|atime|inode|current_time"
            r"|vfsuid|ktime_get_coarse|kiocb|iov_iter|import_iovec|iovec|do_(iter_)?(readv|writev|preadv|pwritev)|buffer_head|block_(write|commit)"
            r"|iomap|fallback|sync_|writeback|xas_|lru_|percpu_counter|inc_|pagecache|workingset|rcu_read|kfree|kmalloc"
            r"|^_*sb_|mnt_|ksys_|make_vfs|i_size|timestamp|truncate_|page_",
        ),
        (
            "system call",
            r"syscall|^entry_|^__x64_sys|^_*fdget|^_*fget|^fput|exit_to_user|ret_from|srso|retbleed|user_enter|user_exit"
            r"|^__(libc_)?p?(read|write)|^p(read|write)v?(64)?(v2)?$|__GI___pthread_(en|dis)able_async|^readv|^writev|^pread|^pwrite|syscall_|copy_from_user",
        ),
        (
            "sleeping, waking",
            r"sched|task|wake|eventfd|epoll|^ep_|poll|hrtimer|ktime|futex|clock_gettime|idle|timer|rseq|rq_|ttwu|pick_|enqueue|dequeue"
            r"|signal|update_|pv_|kvm_|wait|spin_unlock_irq|native_(queued_)?(write|apic|safe)|apic|switch_|_ppoll|select|irq|psi_",
        ),
    )
)
"""First match counts; own code comes before all of them."""


@dataclass(frozen=True)
class Sample:
    """How often a function was seen."""

    count: int
    dso: str
    function: str

    @property
    def is_own(self) -> bool:
        """Whether it is the daemon's code, neither the kernel's nor a library's."""
        return any(self.dso.startswith(name) for name in _OWN)


@dataclass(frozen=True)
class Profiled:
    """What is sampled."""

    title: str
    disk: Disk
    options: BenchOptions


_MIB = 1 << 20
PROFILED = {
    **{row.name: Profiled(row.title, row.disk, row.options) for row in ROWS},
    **{
        f"sequential-tmpfs-{pattern}": Profiled(
            f"tmpfs, sequential {pattern} of 1 MiB", "tmpfs", SizeCase(pattern, _MIB, 1).options
        )
        for pattern in ("read", "write")
    },
}


def group_of(sample: Sample) -> str:
    """Which group of the table a function belongs to."""
    if sample.is_own:
        return "own code"
    return next((name for name, pattern in GROUPS if pattern.search(sample.function)), "other")


def shares(samples: Iterable[Sample]) -> dict[str, float]:
    """Of each group the share of all samples, 0 to 1; "ring" is a part of "own code"."""
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[group_of(sample)] += sample.count
        if sample.is_own and _RING.search(sample.function):
            counts["ring"] += sample.count
    total = sum(count for name, count in counts.items() if name != "ring") or 1
    names = ("own code", "ring", *(name for name, _ in GROUPS), "other")
    return {name: counts[name] / total for name in names}


def parse_report(text: str) -> list[Sample]:
    """Read `perf report --fields sample,dso,sym --field-separator ;`."""
    found = []
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(";", 2)]
        if line.startswith("#") or len(parts) != 3 or not parts[0].isdigit():
            continue
        name = re.sub(r"^\[.\] ", "", parts[2])
        # Clones that the compiler makes of a function are still that function.
        found.append(
            Sample(int(parts[0]), parts[1], re.sub(r"\.(isra|part|constprop|cold)\b.*", "", name))
        )
    return found


def measure_profiles(measure: Measure, is_wanted: Callable[[str], bool]) -> Table:
    """Sample both daemons in every row that is wanted."""
    groups = ("own code", "ring", *(name for name, _ in GROUPS), "other")
    titles = ["", "", "CPU us", "own us", *("of it ring" if g == "ring" else g for g in groups)]
    table = Table("profile", "Shares of the daemon's CPU time", [titles])
    for name, what in PROFILED.items():
        if not is_wanted(name):
            continue
        with measure.serving(what.disk, BOTH) as daemons:
            title = what.title
            for who, daemon in daemons.items():
                metrics, samples = _sample(measure, what, daemon)
                table.rows.append([title, who, *_line(metrics, samples)])
                if who == "ours":
                    table.notes.append(f"{what.title}: {_top(samples)}.")
                title = ""
                print(
                    f"  profile {name} {who}: {sum(s.count for s in samples)} samples", flush=True
                )
    return table


def _sample(measure: Measure, what: Profiled, daemon: Daemon) -> tuple[Metrics, list[Sample]]:
    """One run, and what perf saw of it after the ramp."""
    file = Path(f"{daemon.socket}.perf")
    with _recording(daemon.pid, file) as begin:
        # The client's ramp begins a moment later than this.
        timer = threading.Timer(measure.settings.ramp, begin)
        timer.start()
        try:
            metrics = measure.client(what.disk, what.options, daemon)()
        finally:
            timer.join()
    report = subprocess.run(
        [
            *("perf", "report", "-i", str(file), "--stdio", "-q", "--field-separator", ";"),
            *("--fields", "sample,dso,sym", "--sort", "dso,sym"),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    file.unlink()
    return metrics, parse_report(report.stdout)


@contextmanager
def _recording(pid: int, file: Path) -> Iterator[Callable[[], None]]:
    """Sample a process until the end of the context, from the call of what is given on."""
    command_end, command_fd = os.pipe()
    ack_fd, ack_end = os.pipe()
    with ExitStack() as stack:
        for fd in (command_fd, ack_fd):
            stack.callback(os.close, fd)
        perf = subprocess.Popen(
            [
                *(
                    "perf",
                    "record",
                    "-q",
                    "-e",
                    "cpu-clock",
                    "-F",
                    str(_FREQUENCY),
                    "-o",
                    str(file),
                ),
                *("-p", str(pid), "--delay=-1", f"--control=fd:{command_end},{ack_end}"),
            ],
            pass_fds=(command_end, ack_end),
        )
        stack.callback(perf.wait)
        stack.callback(perf.terminate)
        os.close(command_end)
        os.close(ack_end)
        # It takes a while until it listens.
        os.write(command_fd, b"ping\n")
        if not os.read(ack_fd, 16):
            give_up("perf cannot sample the daemon")
        yield lambda: _tell(command_fd, b"enable\n")
        os.write(command_fd, b"stop\n")
        perf.wait(30)


def _tell(fd: int, words: bytes) -> None:
    os.write(fd, words)


def _line(metrics: Metrics, samples: Sequence[Sample]) -> list[str]:
    found = shares(samples)
    cpu = metrics["backend_cpu_us"]
    own = None if cpu is None else cpu * found["own code"]
    return [
        *("n/a" if value is None else f"{value:.3g}" for value in (cpu, own)),
        *(f"{share:.0%}" if share >= 0.005 else "" for share in found.values()),
    ]


def _top(samples: Iterable[Sample]) -> str:
    total = sum(sample.count for sample in samples) or 1
    counts: Counter[str] = Counter()
    for sample in samples:
        counts[sample.function] += sample.count
    return ", ".join(f"`{name}` {n / total:.0%}" for name, n in counts.most_common(_TOP))


def need_perf() -> None:
    """End the program if perf(1) is not there."""
    if not shutil.which("perf"):
        give_up("perf is not installed (Debian's package linux-perf)")
