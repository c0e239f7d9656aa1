"""The load generator's C tests, each one here: with AddressSanitizer and UBSan, and with ThreadSanitizer."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.requirements import require

HERE = Path(__file__).parent / "load"
SOURCES = Path(__file__).parents[2] / "vhostblk" / "native" / "load_src"
NAMES = re.findall(r"^TEST\((\w+)\)", (HERE / "test_load.c").read_text(), re.MULTILINE)

VARIANTS = {
    "asan": ("gcc", ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]),
    # gcc's ThreadSanitizer does not know fences, clang's does.
    "tsan": ("clang", ["-fsanitize=thread"]),
}


@pytest.fixture(scope="session")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The compiled variants, filled on demand."""
    return {"": tmp_path_factory.mktemp("load")}


def build(programs: dict[str, Path], variant: str) -> Path:
    compiler, flags = VARIANTS[variant]
    require(compiler, group="compiler")
    if variant not in programs:
        output = programs[""] / variant
        subprocess.run(
            [HERE / "build.sh", output, "-Werror", *flags],
            env={**os.environ, "CC": compiler},
            check=True,
            timeout=100,
        )
        programs[variant] = output
    return programs[variant]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_generator(programs: dict[str, Path], variant: str, name: str) -> None:
    done = subprocess.run(
        [build(programs, variant), name], capture_output=True, text=True, timeout=100, check=False
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
