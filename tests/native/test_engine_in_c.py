"""The engine's C tests, each one here: with AddressSanitizer and UBSan, with ThreadSanitizer, and without liburing."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.native.variants import ASAN, TSAN, Variants
from tests.requirements import require

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
NAMES = sorted(
    name
    for source in HERE.glob("test_*.c")
    for name in re.findall(r"^TEST\((\w+)\)", source.read_text(), re.MULTILINE)
)

VARIANTS = {"asan": ASAN, "tsan": TSAN, "without_liburing": ("gcc", ("-DVB_NO_URING", "-O2"))}


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    return Variants(HERE / "build.sh", tmp_path_factory.mktemp("harness"), VARIANTS)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_engine(harness: Variants, variant: str, name: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [harness[variant], name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip(done.stdout.strip().removeprefix("SKIP: "))
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_c_test_is_run(harness: Variants) -> None:
    listed = subprocess.run(
        [harness["without_liburing"], "--list"], capture_output=True, text=True, check=True
    ).stdout.split()

    assert sorted(name for name in listed if not name.startswith("bench_")) == NAMES


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
@pytest.mark.parametrize("flags", [[], ["-DVB_NO_URING"]], ids=["io_uring", "without_liburing"])
def test_the_engine_compiles_without_warnings(
    compiler: str, flags: list[str], tmp_path: Path
) -> None:
    command = [require(compiler, group="compiler"), "-std=gnu11", "-D_GNU_SOURCE=1", "-O2", "-c"]
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Wundef", "-Werror"]
    sources = sorted((ROOT / "vhostblk/native/src").glob("*.c"))

    subprocess.run([*command, *warnings, *flags, *sources], cwd=tmp_path, check=True, timeout=100)


def test_c_files_are_formatted() -> None:
    files = [
        *ROOT.glob("vhostblk/native/**/*.[ch]"),
        *HERE.glob("*.[ch]"),
        *ROOT.glob("tests/fuzz/*.c"),
        *ROOT.glob("tests/qemu/*.c"),
    ]
    files = [path for path in files if path.name not in ("_engine.c", "_load.c")]  # written by cffi

    subprocess.run(
        [require("clang-format"), "--dry-run", "--Werror", *files], check=True, timeout=60
    )


def test_no_c_file_is_too_long() -> None:
    sources = sorted((ROOT / "vhostblk/native/src").glob("*.[ch]"))

    assert {p.name: n for p in sources if (n := len(p.read_text().splitlines())) > 600} == {}
