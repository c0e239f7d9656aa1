"""The same random scripts through vhostblk-io and Debian's qemu-io: same output, same bytes, same allocation."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.differential import scripts
from tests.differential.tools import MEMORY, command_line, compare, mask
from vhostblk.testing.plugin import ExpectedLog
from vhostblk.testing.requirements import require

#: More, and others each time: VHOSTBLK_DIFFERENTIAL=1000.
EXAMPLES = int(os.environ.get("VHOSTBLK_DIFFERENTIAL", "0"))
HARD = settings(
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],  # shrinking takes minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _qemu_io() -> None:
    require("qemu-io")


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    if not MEMORY.is_dir():
        pytest.skip(f"needs {MEMORY}")
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        yield Path(folder)


@HARD
@given(image=scripts.images(), modes=scripts.modes(direct=False), script=scripts.scripts())
def test_raw_file_in_memory(
    memory: Path, image: scripts.Image, modes: dict[str, str], script: list[str]
) -> None:
    compare(memory, image.make, lambda path: command_line(script, scripts.raw(path, modes)))


@HARD
@given(image=scripts.images(), modes=scripts.modes(), script=scripts.scripts())
def test_raw_file_on_disk(
    tmp_path: Path, image: scripts.Image, modes: dict[str, str], script: list[str]
) -> None:
    if modes.get("cache.direct") == "on":
        image = image.with_data_at_the_beginning()
    compare(
        tmp_path,
        image.make,
        lambda path: command_line(script, scripts.raw(path, modes)),
    )


@HARD
@given(
    image=scripts.images(),
    limits=scripts.limits(),
    modes=scripts.modes(direct=False),
    script=scripts.scripts(),
)
def test_odd_limits(
    memory: Path,
    image: scripts.Image,
    limits: dict[str, str],
    modes: dict[str, str],
    script: list[str],
) -> None:
    compare(
        memory,
        image.of_whole_blocks().make,
        lambda path: command_line(script, scripts.debugged(path, limits, modes)),
    )


@pytest.fixture
def _failing_flushes(expect_log: ExpectedLog) -> None:
    """Those at the end, too."""
    expect_log.allow("flush at close failed")


@pytest.mark.usefixtures("_failing_flushes")
@HARD
@given(
    image=scripts.images(),
    options=scripts.debug_options(),
    script=scripts.scripts(faulty=True),
)
def test_injected_errors(
    memory: Path, image: scripts.Image, options: dict[str, str], script: list[str]
) -> None:
    compare(
        memory,
        image.of_whole_blocks().make,
        lambda path: [
            *("-t", "writeback"),
            *command_line(script, scripts.debugged(path, options, {"discard": "unmap"})),
        ],
    )


#: One of each kind of argument that is wrong, unusual, or right; on an image of one MiB.
COMMANDS = """
read|read 0|read 0 512|read -C 0 512|read 0 512 -q|read -1 512|read -P|read -P 300 0 512|read -P 1 0 512
read -v 0 40|read -P 0 -s 600 0 512|read -l 4 0 512|read -l 5 -P 0 0 10|read -l 50 -P 0 0 10|read -P 1 -l 0 0 10
read 0 3G|read 0x10 1.5k|read 1M 1|read 1e3 1|read 0 1e|read 0 0|read 0 1kk|read 0 9E|read 0 -- -5|read 1.5 1
read .5k 1|read 0x1.8 1|read 0x1b 1|read 07 1|read +5 1|read nan 1|read 1.999999k 1|r 0 1|nonsense 1|map|alloc 0
alloc 0 2M|alloc -- 1|alloc -5|alloc 0 0|alloc 2M 1|length|l|info|i|sleep x|sleep 1 2|sleep|sleep 1|sleep -5|flush|f
flush 1|aio_flush x|map 1|c 1|abort x|write -z -P 3 0 1|write -n 0 1|write -u 0 1|write -c 0 512|write -c 0 100
write -b 0 512|read -b 0 512|read -b 0 100|write -bz 0 1|write -bf 0 1|write -x 0 1|write 0 3G|write -zn 0 3G
write -z 0 3G|write -s nofile 0 512|write -s /dev/null 0 512|write -qfP 0x41 3 70000|read -v 0 100|w -q 0 5
writev 0 1 2 3|writev 0 3G|writev 0 2G 1|writev 0 2147483136 1|writev 2M 1|readv 2M 1|readv 0|readv -P 3 0 1 1
discard 0 3G|discard 0 512|d -q 0 1|discard 0|discard -x 0 1|discard 2M 1|truncate|truncate -m foo 1M
truncate -m metadata 2M|truncate x|truncate -m|truncate -m off 1 2|truncate -m falloc 512|truncate 7E|truncate 1M 2k
break a|break foo a|break pwritev a|remove_break a|resume a|wait_break|help foo|help a b|? read x|sigraise x
sigraise 1000|sigraise|sigraise 0|open x|open|open a b|reopen -r -w|reopen -r -r|reopen -c foo|reopen x|reopen -o
reopen -o read-only=on -r|reopen -o cache.direct=on -c none|aio_read 0|aio_read -i 0 512|aio_read -x 0 1
aio_write -i x|aio_write -z 0 1 1|aio_write -u 0 1|aio_write 0 3G|aio_read -q x 1|reopen -r|write 0 1|reopen -w
write -q 0 1|close|length|close|open nofile|open -t foo x|open -d foo x|open -i foo x|open -x|open -U x|quit|length
"""


def test_each_command_and_each_complaint(memory: Path) -> None:
    script = [command for line in COMMANDS.split("\n") for command in line.split("|") if command]
    image = scripts.Image(scripts.MIB, ((0, 4096, 0), (65536, 65536, 65)))
    same = compare(memory, image.make, lambda path: ["-f", "raw", *commands(script), str(path)])
    assert len(same.out) > 100
    assert len(same.err) > 40


def commands(script: list[str]) -> list[str]:
    return [word for command in script for word in ("-c", command)]


def _json(more: str) -> str:
    return f'json:{{"driver":"raw","file":{{"driver":"file","filename":"IMAGE"}},{more}}}'


@pytest.mark.parametrize(
    "arguments",
    [
        ["nofile"],
        ["-f", "raw", "."],
        ["-t", "foo", "IMAGE"],
        ["-d", "foo", "IMAGE"],
        ["-i", "foo", "IMAGE"],
        ["-k", "-f", "raw", "IMAGE"],
        ["-k", "-n", "-f", "raw", "-c", "write -P 7 0 8k", "-c", "read -P 7 0 8k", "IMAGE"],
        ["-f", "raw", "-U", "IMAGE"],
        ["-f", "raw", "-rU", "-c", "length", "IMAGE"],
        ["-f", "raw", "-Cr", "IMAGE"],
        ["-f", "raw", "--image-opts", "IMAGE"],
        ["--image-opts", "filename=IMAGE"],
        ["--image-opts", "driver=raw,file.filename=IMAGE,foo=1"],
        ["--image-opts", "driver=raw,file.filename=IMAGE,read-only=on"],
        ["--image-opts", "driver=raw,file.filename=IMAGE,offset=512,size=512", "-c", "length"],
        ["--image-opts", "driver=file,filename=IMAGE", "-c", "info", "-c", "map"],
        ["--image-opts", "driver=null-co,size=1M", "-c", "length", "-c", "info", "-c", "map"],
        ["-r", "-f", "raw", "-c", "write 0 1", "-c", "truncate 1", "-c", "discard 0 1", "IMAGE"],
        ["-f", "raw", "-m", "-c", "write -P 7 1 100k", "-c", "read -P 7 1 100k", "IMAGE"],
        ["-C", "-f", "raw", "-c", "discard 0 4k", "-c", "read -P 0 0 4k", "IMAGE"],
        ["-C", "-f", "raw", "-d", "ignore", "-c", "discard 0 4k", "-c", "read -P 1 0 4k", "IMAGE"],
        # What the name says comes before what options of the command line mean.
        [_json('"read-only":true')],
        [_json('"read-only":"maybe"')],
        [_json('"cache.direct":"x"')],
        [_json('"discard":"ignore"'), "-c", "discard 0 4k", "-c", "read -P 1 0 4k"],
        ["-d", "ignore", _json('"discard":"unmap"'), "-c", "discard 0 4k", "-c", "read -P 0 0 4k"],
        ["-r", _json('"read-only":false'), "-c", "write 0 512"],
        ["-c", "quit", "-c", "length"],
        ["-n", "-f", "raw", "-c", "quit", "IMAGE"],
    ],
    ids=" ".join,
)
def test_command_line_is_understood_and_refused_alike(tmp_path: Path, arguments: list[str]) -> None:
    compare(
        tmp_path,
        scripts.Image(scripts.MIB, ((0, 4096, 1),)).make,
        lambda path: [word.replace("IMAGE", str(path)) for word in arguments],
    )


BREAKPOINTS = {
    "one after the other": """
break foo a|break pwritev a|aio_write -P 3 512 512|wait_break a|read -P 0 512 512|resume b|resume a|aio_flush
read -P 3 512 512|remove_break a|break write_aio a|aio_write -P 4 0 512|wait_break a|remove_break c|resume a|aio_flush
read -P 4 0 512|resume a|break write_aio a|remove_break a|write -P 4 0 512""",
    "two of one event": """
break write_aio a|break write_aio b|aio_write -P 1 0 512|wait_break a|wait_break b|write -P 2 4k 512|resume a
read -P 0 0 512|resume b|aio_flush|read -P 1 0 512""",
    "two of one event and one tag": """
break write_aio a|break write_aio a|aio_write -P 1 0 512|wait_break a|write -P 2 4k 512|resume a|read -P 0 0 512
resume a|resume a|aio_flush""",
    "one tag twice": """
break write_aio a|aio_write -P 1 0 512|wait_break a|break write_aio a|aio_write -P 2 4k 512|sleep mark|resume a|resume a
resume a|aio_flush|sleep mark|read -P 1 0 512|read -P 2 4k 512""",
}


@pytest.mark.parametrize("script", BREAKPOINTS.values(), ids=BREAKPOINTS)
def test_breakpoints(memory: Path, script: str) -> None:
    image = scripts.Image(scripts.MIB, ())
    said = [command for line in script.split("\n") for command in line.split("|") if command]
    compare(memory, image.make, lambda path: ["-f", "raw", *commands(said), f"blkdebug::{path}"])


_RULES = {
    "of two states the first is next": [
        *("set-state.0.event=write_aio", "set-state.0.new_state=2"),
        *("set-state.1.event=write_aio", "set-state.1.new_state=3"),
        *("inject-error.0.event=write_aio", "inject-error.0.state=2", "inject-error.0.errno=28"),
        *("inject-error.1.event=write_aio", "inject-error.1.state=3", "inject-error.1.errno=95"),
    ],
    "no error is none for good": [
        *("inject-error.0.event=none", "inject-error.0.errno=0", "inject-error.0.once=on"),
        *("inject-error.1.event=none", "inject-error.1.errno=28"),
    ],
    "the file of rules comes first": [
        *("config=FOLDER/rules", "inject-error.0.event=none", "inject-error.0.errno=5"),
        *("set-state.0.event=write_aio", "set-state.0.new_state=3"),
        *("inject-error.1.event=write_aio", "inject-error.1.state=2", "inject-error.1.errno=95"),
    ],
}
_RULES_FILE = """
[inject-error]
event = "none"
errno = "28"
once = "on"
iotype = "write"

[set-state]
event = "write_aio"
new_state = "2"
"""


@pytest.mark.usefixtures("_failing_flushes")
@pytest.mark.parametrize("rules", _RULES.values(), ids=_RULES)
def test_several_rules_that_fit(memory: Path, rules: list[str]) -> None:
    (memory / "rules").write_text(_RULES_FILE)
    words = [f"file.{rule.replace('FOLDER', str(memory))}" for rule in rules]
    node = ["driver=raw", "file.driver=blkdebug", "file.image.driver=file"]
    image = scripts.Image(scripts.MIB, ())
    compare(
        memory,
        image.make,
        lambda path: [
            *("-t", "writeback", "--image-opts"),
            ",".join([*node, f"file.image.filename={path}", *words]),
            *commands(["write 0 512"] * 4),
        ],
    )


@pytest.mark.parametrize("end", ["", "\n", "\n\nquit\nlength\n"])
def test_script_on_standard_input_with_a_prompt_before_each_line(tmp_path: Path, end: str) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(4096))
    script = f"length\nfoo\n\nread -P 1 0 5\n  read  0x5   5 -q{end}"
    said = []
    for program in (["qemu-io"], [sys.executable, "-m", "vhostblk", "io"]):
        done = subprocess.run(
            [*program, "-f", "raw", str(image)],
            input=script,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        out = done.stdout.replace("vhostblk-io> ", "qemu-io> ")
        said.append((list(mask(out)), done.stderr, done.returncode))
    assert said[1] == said[0]
