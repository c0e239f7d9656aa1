"""Wrong options of `vhostblk bench`: exit code 1 and one line that names option and value."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.cli.complaints import complain
from vhostblk.cli import main as cli
from vhostblk.native import load

pytestmark = [
    pytest.mark.usefixtures("folder"),
    pytest.mark.skipif(not load.available(), reason="the generator is not built"),
]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "a SOCKET is needed"),
        (("missing",), "missing: No such file or directory"),
        (("not-a-socket",), "not-a-socket: Connection refused"),
        (("x" * 200,), "AF_UNIX path too long"),
        (("s", "--typo"), "--typo"),
        (("s", "--pattern", "reads"), "pattern 'reads': one of read, write"),
        (("s", "--read-percent", "50"), "read-percent: the pattern 'randread'"),
        (("s", "--read-percent", "100"), "--read-percent: '100' is not a number from 1 to 99"),
        (("s", "--block-size", "4x"), "--block-size: '4x' is not a size"),
        (("s", "--block-size", "4k-"), "--block-size: '' is not a size"),
        (("s", "--block-size", "1000"), "block-size 1000: a multiple of 512 is needed"),
        (("s", "--block-size", "9" * 30), "--block-size: '999"),
        (("s", "--size", "99999999T"), "--size: '99999999T' is too large"),
        (("s", "--depth", "0"), "--depth: '0'"),
        (("s", "--depth", "100", "--queue-size", "64"), "depth 100: 100 descriptors"),
        (("s", "--queues", "257"), "--queues: '257'"),
        (("s", "--threads", "2"), "threads 2: there are only 1 queues"),
        (("s", "--wait", "sleep"), "--wait: invalid choice: 'sleep'"),
        (("s", "--duration", "soon"), "--duration: 'soon' is not a number of seconds"),
        (("s", "--duration", "nan"), "--duration: 'nan'"),
        (("s", "--duration", "-1"), "--duration: '-1'"),
        (("s", "--duration", "0"), "duration 0"),
        (("s", "--once"), "once: the pattern 'randread' has no end"),
        (("s", "--runs", "3"), "--runs is for --compare"),
        (("s", "--compare", "t", "--pid", "1"), "--pid: with --compare there are two"),
        (("s", "--self-test"), "--self-test needs no back-end"),
        (("--self-test", "--compare", "s"), "--self-test needs no back-end"),
    ],
)
def test_bench_refuses(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], folder: Path
) -> None:
    assert message in complain(cli.main, ("bench", *words), capsys)
