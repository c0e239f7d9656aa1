"""vhostblk img against qemu-img, on images of some GiB that are half full: `python -m tests.bench.img`.

Each job is run by both programs in turns, and who begins changes, too; figures are medians, and what counts is the
ratio of one such run. The images are in the page cache. *Striped*: every other MiB has data, one behind the other in
the file. *Scattered*: every other cluster of 64 KiB on average, anywhere in the file, so that no two are neighbours.

A program of its own. Knows nothing about how tables look.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

_CLUSTER = 64 << 10


@dataclass(frozen=True)
class Job:
    """A command line that both are given.

    Attributes:
        words: behind the program's name; `{striped}` and the like are paths.
        target: how many times qemu-img's time may be taken.
        makes: names of files that it makes, which are removed after each run.
    """

    name: str
    words: str
    target: float
    makes: Sequence[str] = ()


JOBS = (
    Job("compare", "compare {striped} {raw}", 1.5),
    Job("compare-qcow2", "compare {striped} {copy}", 1.5),
    Job("check", "check {striped}", 1.5),
    Job("check-scattered", "check {scattered}", 1.5),
    Job("map", "map {striped}", 1.5),
    Job("map-json", "map --output=json {striped}", 1.5),
    Job("map-scattered", "map --output=json {scattered}", 1.5),
    Job("convert-to-raw", "convert -O raw {striped} {target}", 1.2, ("target",)),
    Job("convert-to-qcow2", "convert -O qcow2 {raw} {target}", 1.2, ("target",)),
    Job("convert-compressed", "convert -c -O qcow2 {raw} {target}", 1.3, ("target",)),
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
        folder = args.folder
        if folder is None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        images = make_images(folder, int(args.size * (1 << 30)) >> 20 << 20, jobs)
        print(f"{'':18}{'qemu-img':>16}{'vhostblk img':>16}{'ratio':>14}{'target':>8}")
        print(f"{'':18}{'wall':>8}{'cpu':>8}{'wall':>8}{'cpu':>8}{'wall':>7}{'cpu':>7}")
        missed = [job for job in jobs if not _measure(job, images, args.rounds)]
    return 1 if missed else 0


def make_images(folder: Path, size: int, jobs: Sequence[Job]) -> dict[str, Path]:
    """The images that the jobs name, and places for what they make; what is there already is used again."""
    makers = {"raw": _make_raw, "striped": _convert, "copy": _convert, "scattered": _scatter}
    names = [f"raw-{size}.raw", *(f"{name}-{size}.qcow2" for name in list(makers)[1:])]
    images = {name: folder / file for name, file in zip(makers, names, strict=True)}
    words = " ".join(job.words for job in jobs)
    for name, make in makers.items():
        is_wanted = f"{{{name}}}" in words or (name == "raw" and "{striped}" in words)
        if is_wanted and not images[name].exists():
            part = images[name].with_suffix(".part")
            make(part, size, images)
            part.rename(images[name])
    made = {name: folder / f"made-{name}" for job in jobs for name in job.makes}
    return {**images, **made}


def _make_raw(path: Path, size: int, images: Mapping[str, Path]) -> None:
    noise = random.Random(1).randbytes(2 << 20)
    with path.open("wb") as file:
        for at in range(0, size, 2 << 20):
            # No two stripes are alike, and no cluster compresses.
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


def _stock(*words: object, text: str = "") -> None:
    command = [str(word) for word in words]
    subprocess.run(command, input=text, text=True, stdout=subprocess.DEVNULL, check=True)


def _measure(job: Job, images: Mapping[str, Path], rounds: int) -> bool:
    words = job.words.format(**images).split()
    programs = (["qemu-img"], [sys.executable, "-m", "vhostblk", "img"])
    runs: tuple[list[Run], list[Run]] = ([], [])
    for number in range(rounds + 1):
        for which in (0, 1) if number % 2 else (1, 0):
            run = _run([*programs[which], *words])
            for name in job.makes:
                images[name].unlink(missing_ok=True)
            if number:  # the first round reads files into the page cache
                runs[which].append(run)
    walls = [statistics.median(run.wall for run in side) for side in runs]
    cpus = [statistics.median(run.cpu for run in side) for side in runs]
    ratio, cpu_ratio = walls[1] / walls[0], cpus[1] / cpus[0]
    print(
        f"{job.name:18}{walls[0]:8.3f}{cpus[0]:8.3f}{walls[1]:8.3f}{cpus[1]:8.3f}"
        f"{ratio:7.2f}{cpu_ratio:7.2f}{job.target:8.2f}{'' if ratio <= job.target else '  missed'}",
        flush=True,
    )
    return ratio <= job.target


def _run(command: list[str]) -> Run:
    begin = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return Run(wall, usage.ru_utime + usage.ru_stime)


if __name__ == "__main__":
    sys.exit(main())
