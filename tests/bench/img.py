"""vhostblk img against qemu-img, on images of some GiB that are half full: `python -m tests.bench.img`.

Each job is run by both programs in turns, and who begins changes, too; figures are medians, and what counts is the
ratio of one such run. The images are in the page cache. *Striped*: every other MiB has data, one behind the other in
the file. *Scattered*: every other cluster of 64 KiB on average, anywhere in the file, so that no two are neighbours.
*Text*: as striped, of sixteen letters, because what is striped does not compress. *Tables*: 64 times as large, and all
of it has a place, where nothing was ever written: tables are all there is. *Start*: what any job takes, whatever it
does.

vhostblk is copied to where it would be installed, in an environment of its own, and has its bytecode there.

Before each run that makes a file all free memory is touched: where a virtual machine gives free memory back to its host
(virtio-balloon's free page reporting), its first use after that takes several times as long as a copy, and it would be
chance who has to pay for it.

A program of its own. Knows nothing about how tables look.
"""

from __future__ import annotations

import argparse
import importlib.util
import mmap
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

import vhostblk

_CLUSTER = 64 << 10
# Memory that stays free for all others while the rest is touched.
_SPARE = 1 << 30


@dataclass(frozen=True)
class Job:
    """A command line that both are given.

    Attributes:
        words: behind the program's name; `{striped}` and the like are paths.
        target: how many times qemu-img's time may be taken; None: nobody has said.
        makes: names of files that it makes, which are removed after each run.
    """

    name: str
    words: str
    target: float | None
    makes: Sequence[str] = ()


JOBS = (
    Job("start", "--version", None),
    Job("compare", "compare {striped} {raw}", 1.5),
    Job("compare-qcow2", "compare {striped} {copy}", 1.5),
    Job("check", "check {striped}", 1.5),
    Job("check-scattered", "check {scattered}", 1.5),
    Job("check-tables", "check {tables}", 1.5),
    Job("map", "map {striped}", 1.5),
    Job("map-json", "map --output=json {striped}", 1.5),
    Job("map-scattered", "map --output=json {scattered}", 1.5),
    Job("map-tables", "map --output=json {tables}", 1.5),
    Job("convert-to-raw", "convert -O raw {striped} {target}", 1.2, ("target",)),
    Job("convert-to-qcow2", "convert -O qcow2 {raw} {target}", 1.2, ("target",)),
    Job("convert-compressed", "convert -c -O qcow2 {text} {target}", 1.3, ("target",)),
    Job("convert-scattered", "convert -O raw {scattered} {target}", 1.2, ("target",)),
)


@dataclass(frozen=True)
class Run:
    """Seconds: on the clock, and of processors."""

    wall: float
    cpu: float


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; 1 if a target is missed."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.img", description=__doc__)
    parser.add_argument("jobs", nargs="*", metavar="JOB", help="shell patterns of names; all")
    parser.add_argument("--list", action="store_true", help="names of the jobs")
    parser.add_argument("--size", type=float, default=4, metavar="GIB", help="of the disks (4)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="of each job (5)")
    parser.add_argument("--folder", type=Path, help="for the images; a temporary one")
    args = parser.parse_args(argv)
    jobs = [
        job for job in JOBS if not args.jobs or any(fnmatch(job.name, one) for one in args.jobs)
    ]
    if args.list:
        print(*(job.name for job in jobs), sep="\n")
        return 0
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder = args.folder or temporary
        programs = ["qemu-img"], [str(_install(temporary / "installed")), "-m", "vhostblk", "img"]
        size = int(args.size * (1 << 30)) >> 20 << 20
        images = make_images(folder, size, jobs)
        print(f"{'':18}{'qemu-img':>16}{'vhostblk img':>16}{'ratio':>14}{'target':>8}")
        print(f"{'':18}{'wall':>8}{'cpu':>8}{'wall':>8}{'cpu':>8}{'wall':>7}{'cpu':>7}")
        missed = [job for job in jobs if not _measure(job, programs, images, args.rounds)]
    return 1 if missed else 0


def make_images(folder: Path, size: int, jobs: Sequence[Job]) -> dict[str, Path]:
    """The images that the jobs name, and places for what they make; what is there already is used again."""
    makers = {
        "raw": _make_raw,
        "text": _make_text,
        "striped": _convert,
        "copy": _convert,
        "scattered": _scatter,
        "tables": _make_tables,
    }
    images = {
        name: folder / f"{name}-{size}.{'raw' if name in ('raw', 'text') else 'qcow2'}"
        for name in makers
    }
    words = " ".join(job.words for job in jobs)
    for name, make in makers.items():
        is_wanted = f"{{{name}}}" in words or (name == "raw" and "{striped}" in words)
        if is_wanted and not images[name].exists():
            part = images[name].with_suffix(".part")
            make(part, size, images)
            part.rename(images[name])
    made = {name: folder / f"made-{name}" for job in jobs for name in job.makes}
    return {**images, **made}


def _install(folder: Path) -> Path:
    """Make an environment that has vhostblk, and what it needs; its Python."""
    venv.create(folder, symlinks=True)
    packages = next(folder.glob("lib/python*/site-packages"))
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(vhostblk.__file__).parent, packages / "vhostblk", ignore=ignored)
    binding = importlib.util.find_spec("_cffi_backend")
    if binding is not None and binding.origin is not None:
        (packages / Path(binding.origin).name).symlink_to(binding.origin)
    return folder / "bin" / "python"


def _make_raw(path: Path, size: int, images: Mapping[str, Path]) -> None:
    _write_stripes(path, size, random.Random(1).randbytes(2 << 20))


def _make_text(path: Path, size: int, images: Mapping[str, Path]) -> None:
    _write_stripes(path, size, random.Random(1).randbytes(1 << 20).hex().encode())


def _write_stripes(path: Path, size: int, noise: bytes) -> None:
    with path.open("wb") as file:
        for at in range(0, size, 2 << 20):
            # No two stripes are alike.
            shift = at // (2 << 20) * 512 % (1 << 20)
            file.seek(at)
            file.write(noise[shift : shift + (1 << 20)])
        file.truncate(size)


def _convert(path: Path, size: int, images: Mapping[str, Path]) -> None:
    _stock("qemu-img", "convert", "-f", "raw", "-O", "qcow2", images["raw"], path)


def _scatter(path: Path, size: int, images: Mapping[str, Path]) -> None:
    _stock("qemu-img", "create", "-q", "-f", "qcow2", path, size)
    clusters = random.Random(2).sample(range(size // _CLUSTER), size // _CLUSTER // 2)
    lines = "".join(f"write -q -P 5 {cluster * _CLUSTER} 4k\n" for cluster in clusters)
    _stock("qemu-io", "-f", "qcow2", path, text=lines)


def _make_tables(path: Path, size: int, images: Mapping[str, Path]) -> None:
    _stock(
        *("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata"),
        path,
        64 * size,
    )


def _stock(*words: object, text: str = "") -> None:
    command = [str(word) for word in words]
    subprocess.run(command, input=text, text=True, stdout=subprocess.DEVNULL, check=True)


def _measure(
    job: Job,
    programs: tuple[list[str], list[str]],
    images: Mapping[str, Path],
    rounds: int,
) -> bool:
    words = job.words.format(**images).split()
    runs: tuple[list[Run], list[Run]] = ([], [])
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            if job.makes:
                _touch_free_memory()
            run = _run([*programs[which], *words])
            for name in job.makes:
                images[name].unlink(missing_ok=True)
            if number:  # the first round reads files into the page cache
                runs[which].append(run)
    walls = [statistics.median(run.wall for run in side) for side in runs]
    cpus = [statistics.median(run.cpu for run in side) for side in runs]
    ratio, cpu_ratio = walls[1] / walls[0], cpus[1] / cpus[0]
    is_met = job.target is None or ratio <= job.target
    target = "" if job.target is None else f"{job.target:.2f}"
    print(
        f"{job.name:18}{walls[0]:8.3f}{cpus[0]:8.3f}{walls[1]:8.3f}{cpus[1]:8.3f}"
        f"{ratio:7.2f}{cpu_ratio:7.2f}{target:>8}{'' if is_met else '  missed'}",
        flush=True,
    )
    return is_met


def _touch_free_memory() -> None:
    """Have it here: the host gets it again, but only after seconds."""
    found = re.search(r"^MemFree: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    size = (int(found[1]) << 10) - _SPARE
    if size > 0:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | mmap.MAP_POPULATE
        mmap.mmap(-1, size, flags=flags).close()


def _run(command: list[str]) -> Run:
    begin = time.perf_counter()
    environment = {name: value for name, value in os.environ.items() if name[:6] != "PYTHON"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return Run(wall, usage.ru_utime + usage.ru_stime)


if __name__ == "__main__":
    sys.exit(main())
