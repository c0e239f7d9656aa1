"""Every example in the documentation runs, and says what the document says it does.

A ```console block holds commands (`$ `, continued while a line ends in a backslash, or up to the end of a
here-document) and what they print. A ```python
block is a program; a ```output block behind it is what it prints. `...` stands for any text in a line, and alone on a
line for any lines. The blocks of a document run in order in one empty folder, with the programs of this Python's
environment in PATH.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.documents import DOCS, FEATURES, Block, blocks, read
from vhostblk.testing.requirements import require

#: Seconds for one block, which may boot a guest: longer than that may take, shorter than a test may.
DEADLINE = 100.0
SCRIPTS = Path(sysconfig.get_path("scripts"))

DOCUMENTS = sorted(path.name for path in DOCS.glob("*.md"))


def runnable(document: str) -> list[Block]:
    return [b for b in blocks(read(f"docs/{document}")) if b.kind in ("console", "python")]


@pytest.fixture
def folder(socket_directory: Path) -> Iterator[Path]:
    """An empty folder; daemons that an example left there are ended, and held against it."""
    yield socket_directory
    deadline = time.monotonic() + 10
    while pid_files := list(socket_directory.glob("*.pid")):
        if time.monotonic() > deadline:
            for path in pid_files:
                os.kill(int(path.read_text()), signal.SIGKILL)
            pytest.fail(f"left running: {[path.name for path in pid_files]}")
        time.sleep(0.01)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_examples_do_what_the_document_says(document: str, folder: Path) -> None:
    if not runnable(document):
        assert document not in FEATURES
        return
    if not (SCRIPTS / "vhostblk").exists():
        pytest.fail(f"vhostblk is not installed in {SCRIPTS}: pip install -e .")
    everything = blocks(read(f"docs/{document}"))
    for number, block in enumerate(everything):
        if block.kind not in ("console", "python"):
            continue
        if block.needs:
            require(*block.needs)
        where = f"docs/{document}:{block.line}"
        if block.kind == "console":
            run_console(block, folder, where)
        else:
            following = everything[number + 1] if number + 1 < len(everything) else None
            expected = following.text if following and following.kind == "output" else None
            run_python(block, expected, folder, where)


@pytest.mark.parametrize("document", FEATURES)
def test_feature_has_an_example_that_runs(document: str) -> None:
    assert runnable(document)


def run_console(block: Block, folder: Path, where: str) -> None:
    steps = commands(block.text)
    assert steps, f"{where}: no command"
    script = "".join(f"{command}\necho '@@@'$?\n" for command, _ in steps)
    output = run(["bash", "-c", script], folder, where)
    parts = re.split(r"@@@(\d+)\n", output)
    for index, (command, expected) in enumerate(steps):
        assert len(parts) > 2 * index + 1, f"{where}: no end of: {command}\n{output}"
        said, status = parts[2 * index], parts[2 * index + 1]
        assert status == "0", f"{where}: exit status {status}: {command}\n{said}"
        if expected:
            check_output(said, expected, f"{where}: {command}")


def run_python(block: Block, expected: str | None, folder: Path, where: str) -> None:
    program = folder / "example.py"
    program.write_text(block.text)
    output = run([sys.executable, "example.py"], folder, where)
    program.unlink()
    if expected is not None:
        check_output(output, expected, where)


def run(command: list[str], folder: Path, where: str) -> str:
    """What it prints. A file instead of a pipe: daemons in the background keep it open."""
    environment = {**os.environ, "PATH": f"{SCRIPTS}{os.pathsep}{os.environ['PATH']}"}
    said = os.memfd_create("output")
    try:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )
        try:
            status = process.wait(DEADLINE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = -signal.SIGKILL
        output = os.pread(said, os.fstat(said).st_size, 0).decode()
    finally:
        os.close(said)
    assert status == 0, f"{where}: exit status {status}\n{output}"
    return output


def commands(text: str) -> list[tuple[str, str]]:
    """(command, expected output) of a console block."""
    steps: list[tuple[str, str]] = []
    lines = iter(text.splitlines())
    for line in lines:
        if line.startswith("$ "):
            command = line[2:]
            while command.endswith("\\"):
                command += "\n" + next(lines)
            if here := re.search(r"<<(\w+)$", command):
                for text in lines:
                    command += f"\n{text}"
                    if text == here[1]:
                        break
            steps.append((command, ""))
        else:
            assert steps, "a console block begins with '$ '"
            command, expected = steps[-1]
            steps[-1] = (command, f"{expected}{line}\n")
    return steps


def check_output(said: str, expected: str, where: str) -> None:
    pattern = ""
    for line in expected.splitlines():
        if line == "...":
            pattern += r"(?:.*\n)*?"
        else:
            pattern += ".*?".join(re.escape(part) for part in line.split("...")) + r"\n"
    assert re.fullmatch(pattern, said), f"{where}\nexpected:\n{expected}\nbut:\n{said}"


# ---------------------------------------------------------------- the checker itself


def test_expected_output_allows_what_it_leaves_out_and_nothing_else() -> None:
    check_output("a 1 b\nc\n", "a ... b\nc\n", "")
    check_output("x\ny\nz\n", "x\n...\n", "")
    for said in ("a b\n", "a 1 b\nc\nd\n", "a 1 b\n"):
        with pytest.raises(AssertionError):
            check_output(said, "a ... b\nc\n", "")


def test_failing_command_in_the_middle_of_a_block_is_noticed(tmp_path: Path) -> None:
    block = Block("console", "$ false\n$ true\n", 1, ())
    with pytest.raises(AssertionError, match="exit status 1: false"):
        run_console(block, tmp_path, "here")


def test_continued_lines_and_here_documents_are_one_command() -> None:
    assert commands("$ a \\\n    b\nsaid\n$ c\n") == [("a \\\n    b", "said\n"), ("c", "")]
    assert commands("$ cat <<END\nx\nEND\nx\n") == [("cat <<END\nx\nEND", "x\n")]
