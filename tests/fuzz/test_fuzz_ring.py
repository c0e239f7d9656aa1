"""Runs `fuzz_ring.c`, the fuzzer of the engine's queues, for a while: VHOSTBLK_FUZZ_SECONDS, or 10 s.

Its inputs are those of `test_fuzz_split_ring.py` and `test_fuzz_packed_ring.py`, whose corpora it
starts from; what it finds on the way is not kept. Without VHOSTBLK_FUZZ_SECONDS it tries the same each time.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.requirements import require

HERE = Path(__file__).parent
NATIVE = HERE.parents[1] / "vhostblk" / "native"
SECONDS = int(os.environ.get("VHOSTBLK_FUZZ_SECONDS", "10"))
SEED = 0 if "VHOSTBLK_FUZZ_SECONDS" in os.environ else 1  # 0: libFuzzer takes any


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    clang = require("clang", group="compiler")
    output = tmp_path_factory.mktemp("fuzz") / "fuzz_ring"
    command = [clang, "-std=gnu11", "-D_GNU_SOURCE=1", "-DVB_NO_URING", "-g", "-O1", "-pthread"]
    flags = ["-fsanitize=fuzzer,address,undefined", "-fno-sanitize-recover=undefined"]
    sources = [HERE / "fuzz_ring.c", *sorted((NATIVE / "src").glob("*.c"))]
    built = subprocess.run(
        [*command, *flags, "-Wall", "-Wextra", "-Werror", f"-I{NATIVE}", "-o", output, *sources],
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    if "unsupported option" in built.stderr or "cannot find" in built.stderr:
        pytest.skip("this clang comes without libFuzzer")
    assert built.returncode == 0, built.stderr
    return output


@pytest.mark.timeout(SECONDS + 150)
def test_any_ring_comes_to_rest(fuzzer: Path, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            fuzzer,
            f"-max_total_time={SECONDS}",
            f"-seed={SEED}",
            "-max_len=20000",
            "-timeout=10",
            tmp_path,
            HERE / "corpus" / "split_ring",
            HERE / "corpus" / "packed_ring",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS + 100,
        check=False,
    )

    assert done.returncode == 0, done.stderr[-4000:]
    assert "Done" in done.stderr
