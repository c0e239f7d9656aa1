"""The load generator's C tests, each one here: with AddressSanitizer and UBSan, and with ThreadSanitizer."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.native.variants import ASAN, TSAN, Variants
from tests.requirements import require

HERE = Path(__file__).parent / "load"
SOURCES = Path(__file__).parents[2] / "vhostblk" / "native" / "load_src"
NAMES = re.findall(r"^TEST\((\w+)\)", (HERE / "test_load.c").read_text(), re.MULTILINE)

VARIANTS = {"asan": ASAN, "tsan": TSAN}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Variants:
    return Variants(HERE / "build.sh", tmp_path_factory.mktemp("load"), VARIANTS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generator(programs: Variants, variant: str, name: str) -> None:
    done = subprocess.run(
        [programs[variant], name], capture_output=True, text=True, timeout=100, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("compiler", ["gcc", "clang"])
def test_the_generator_compiles_without_warnings(compiler: str, tmp_path: Path) -> None:
    command = [require(compiler, group="compiler"), "-std=gnu11", "-D_GNU_SOURCE=1", "-O2", "-c"]
    warnings = ["-Wall", "-Wextra", "-Wshadow", "-Wundef", "-Werror"]
    include = f"-I{SOURCES.parent}"

    subprocess.run(
        [*command, *warnings, include, *SOURCES.glob("*.c")], cwd=tmp_path, check=True, timeout=100
    )
