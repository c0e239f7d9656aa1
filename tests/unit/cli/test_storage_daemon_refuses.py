"""Wrong options of `vhostblk-storage-daemon`: exit code 1 and one line that names option and value.

Both spellings of the program and of its options: dotted keys and JSON. No socket exists when it ends, nor did before.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.cli.complaints import complain
from vhostblk.cli import main as cli

pytestmark = pytest.mark.usefixtures("folder")

DISK = '"node-name":"d","filename":"disk.img"'
GOOD = "vhost-user-blk,id=e,node-name=d,addr.type=unix,addr.path=sock"
BLOCKDEV = ("--blockdev", "file,node-name=d,filename=disk.img")
EXPORT = ("--export", GOOD)

# what --blockdev is given; what must be in the line behind it
BLOCKDEVS = [
    ("", "Parameter 'driver' is missing"),
    ("filename=disk.img", "Parameter 'driver' is missing"),
    ("driver=ftp,node-name=d", "Unknown driver 'ftp'"),
    ("vmdk,node-name=d,file=x", "Unknown driver 'vmdk'"),
    ("[]", "Unknown driver '[]'"),
    (
        "driver=file,node-name=d,filename=disk.img,typo=1",
        "(node 'd') does not support the option 'typo'",
    ),
    ("file,node-name=d", "Parameter 'filename' is missing"),
    ("file,node-name=d,filename=", "The 'file' block driver requires a file name"),
    ("file,node-name=d,filename=missing", "Could not open 'missing': No such file"),
    ("file,node-name=d,filename=folder", "Could not open 'folder': Is a directory"),
    ("file,node-name=d,filename=fifo", "Could not open 'fifo': neither a regular"),
    (
        "host_device,node-name=d,filename=disk.img",
        "requires 'disk.img' to be either a character or block device",
    ),
    (
        "file,node-name=d,filename=disk.img,read-only=maybe",
        "'read-only' expects 'on' or 'off', not 'maybe'",
    ),
    (
        "file,node-name=d,filename=disk.img,cache.direct=7",
        "'cache.direct' expects 'on' or 'off', not '7'",
    ),
    (
        "file,node-name=d,filename=disk.img,cache.typo=on",
        "does not support the option 'cache.typo'",
    ),
    ("file,node-name=d,filename=disk.img,cache=x,cache.direct=on", "'cache.*' used inconsistently"),
    ("file,node-name=d,filename=disk.img,aio=native", "'aio' does not accept value 'native'"),
    ("file,node-name=d,filename=disk.img,locking=maybe", "'locking' does not accept value 'maybe'"),
    ("file,node-name=d,filename=disk.img,discard=yes", "'discard' does not accept value 'yes'"),
    (
        "file,node-name=d,filename=disk.img,detect-zeroes=unmap",
        "'detect-zeroes=unmap' can only be used with 'discard=unmap'",
    ),
    ("file,node-name=d,filename=disk.img,force-share=on", "'force-share=on' can only be used with"),
    ("file,node-name=1d,filename=disk.img", "Invalid node-name: '1d'"),
    (f"file,node-name={'d' * 32},filename=disk.img", "Invalid node-name: 'ddd"),
    ("raw,node-name=d", "Parameter 'file' is missing"),
    ("raw,node-name=d,file=x", "Cannot find node 'x'"),
    ("raw,node-name=d,file=d", "Cannot find node 'd'"),
    ("raw,node-name=d,file.driver=raw,file.file=d", "Cannot find node 'd'"),
    (
        "raw,node-name=r,file.driver=file,file.filename=disk.img,file.typo=1",
        "the option 'file.typo'",
    ),
    ("raw,node-name=r,file.driver=ftp", "Unknown driver 'ftp' for 'file.driver'"),
    ("null-co,node-name=d,size=-1", "'size' expects a size from 0 to"),
    ("null-co,node-name=d,size=8E", "'size' expects a size from 0 to"),
    (f"null-co,node-name=d,size={'9' * 5000}", "'size' expects a size from 0 to"),
    ("null-co,node-name=d,latency-ns=x", "'latency-ns' expects a number from 0 to"),
    (f"null-co,node-name=d,latency-ns={'9' * 5000}", "'latency-ns' expects a number from 0 to"),
    ("memory,node-name=d", "Parameter 'size' is missing"),
    ("driver", "Unknown driver 'driver'"),
    ("driver=file,node-name", "Expected '=' after parameter 'node-name'"),
    ("driver=file,=x", "Invalid parameter ''"),
    ("driver=file,file.=x", "Invalid parameter 'file.'"),
    ("a." * 3000 + "b=1", "Invalid parameter 'a.a.a."),
    # the same in JSON
    ("{", "JSON parse error, premature EOI"),
    ('{"driver":"file","driver":"raw"}', "JSON parse error, duplicate key"),
    ('{"a":' * 30000 + "1" + "}" * 30000, "JSON nesting depth limit exceeded"),
    ('{"a":' * 300 + "1" + "}" * 300, "JSON nesting depth limit exceeded"),
    ('{"a":' + "9" * 5000 + "}", "Parameter 'driver' is missing"),
    ('{"driver":"ftp"}', "Unknown driver 'ftp'"),
    ('{"driver":["file"]}', "Parameter 'driver' is missing"),
    ('{"driver":5}', "Unknown driver '5'"),
    ('{"driver":"file","node-name":"d","filename":5}', "'filename' expects a string, not '5'"),
    ('{"driver":"file","node-name":"d","filename":null}', "'filename' expects a string"),
    (
        r'{"driver":"file","node-name":"d","filename":"a\u0000b"}',
        r"'filename' expects a string, not 'a\x00b'",
    ),
    (r'{"driver":"file","node-name":"d","filename":"a\nb"}', r"Could not open 'a\nb'"),
    (f'{{"driver":"file",{DISK},"read-only":1}}', "'read-only' expects 'on' or 'off', not '1'"),
    (f'{{"driver":"file",{DISK},"cache":true}}', "does not support the option 'cache'"),
    (
        f'{{"driver":"file",{DISK},"cache":{{"direct":5}}}}',
        "'cache.direct' expects 'on' or 'off', not '5'",
    ),
    ('{"driver":"null-co","node-name":"d","size":1.5}', "'size' expects a size from 0 to"),
    ('{"driver":"null-co","node-name":"d","size":true}', "'size' expects a size from 0 to"),
]

# what --export is given, with a good --blockdev; what must be in the line behind it
EXPORTS = [
    ("", "Parameter 'type' is missing"),
    ("type=nbd,id=e,node-name=d", "'type' does not accept value 'nbd'"),
    ("vhost-user-blk,node-name=d,addr.type=unix,addr.path=s", "Parameter 'id' is missing"),
    ("vhost-user-blk,id=e,addr.type=unix,addr.path=s", "Parameter 'node-name' is missing"),
    ("vhost-user-blk,id=e,node-name=d", "Parameter 'addr.type' is missing"),
    ("vhost-user-blk,id=e,node-name=d,addr.type=inet", "'addr.type' does not accept value 'inet'"),
    ("vhost-user-blk,id=e,node-name=d,addr.type=unix", "Parameter 'addr.path' is missing"),
    ("vhost-user-blk,id=e,node-name=d,addr.type=fd", "Parameter 'addr.str' is missing"),
    ("vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=x", "addr.str=x: must be"),
    ("vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=-1", "addr.str=-1: must be"),
    ("vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=²", "addr.str=²: must be"),
    (
        "vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=9999999999",
        "addr.str=9999999999: must be",
    ),
    (
        "vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=3,addr.path=s",
        "'addr.path' is unexpected",
    ),
    (GOOD + ",addr.str=3", "'addr.str' is unexpected"),
    *(
        (
            f"vhost-user-blk,id=e,node-name=d,addr.type=fd,addr.str=3,{option}",
            f"Parameter '{option.partition('=')[0]}' is unexpected with addr.type=fd",
        )
        for option in ("addr.mode=0600", "addr.owner=root", "addr.group=0")
    ),
    *(
        (f"{GOOD},addr.mode={mode}", "Parameter 'addr.mode' expects three octal digits")
        for mode in ("", "8", "66", "0888", "1777", "rw", "00660")
    ),
    (
        '{"type": "vhost-user-blk", "id": "e", "node-name": "d", "addr": {"type": "unix", "path": "s", "mode": 660}}',
        "Parameter 'addr.mode' expects three octal digits, as in 0660, not '660'",
    ),
    (GOOD + ",addr.owner=no such user", "'addr.owner': there is no user 'no such user'"),
    (GOOD + ",addr.owner=0:nope", "Parameter 'addr.owner': there is no group 'nope'"),
    (GOOD + ",addr.owner=4294967295", "'addr.owner' expects a user, not '4294967295'"),
    (GOOD + ",addr.owner=root:0,addr.group=1", "the group of the socket is given twice"),
    (GOOD + ",addr.group=-1", "Parameter 'addr.group': there is no group '-1'"),
    (GOOD + ",allow-user=root", "Parameter 'allow-user' is unexpected"),
    (GOOD + ",allow-user.1=root", "Parameter 'allow-user.1' is unexpected"),
    (GOOD + ",allow-group.0=nope", "Parameter 'allow-group.0': there is no group 'nope'"),
    (GOOD + ",typo=1", "Parameter 'typo' is unexpected"),
    (GOOD + ",id=", "'id' expects an identifier"),
    (
        GOOD + ",id=7",
        "'id' expects an identifier (a letter, then letters, digits, '-', '.' or '_'), not '7'",
    ),
    (GOOD + ",writable=perhaps", "'writable' expects 'on' or 'off', not 'perhaps'"),
    (GOOD + ",writethrough=2", "'writethrough' expects 'on' or 'off', not '2'"),
    (GOOD + ",num-queues=0", "num-queues=0: must be 1 to 256"),
    (GOOD + ",num-queues=-1", "'num-queues' expects a number from 0 to"),
    (GOOD + ",num-queues=257", "num-queues=257: must be 1 to 256"),
    (GOOD + ",num-queues=two", "not 'two'"),
    (GOOD + ",logical-block-size=100", "logical-block-size=100: must be a power of two"),
    (GOOD + ",logical-block-size=4M", "logical-block-size=4194304: must be"),
    (GOOD + ",max-segments=0", "max-segments=0: must be 1 to 64"),
    (GOOD + ",max-segments=65", "max-segments=65: must be 1 to 64"),
    (GOOD + f",serial={'x' * 21}", "--export id=e: serial 'xxxxxxxxxxxxxxxxxxxxx': at most 20"),
    (
        GOOD + ",iothread-vq-mapping.0.iothread=io9",
        '--export id=e: IOThread "io9" object does not exist',
    ),
    (GOOD + ",iothread=io9", '--export id=e: IOThread "io9" object does not exist'),
    (
        '{"type":"vhost-user-blk","id":"e","node-name":"d","addr":{"type":"unix","path":5}}',
        "'addr.path' expects a string, not '5'",
    ),
    (
        '{"type":"vhost-user-blk","id":"e","node-name":"d","addr":"s"}',
        "Parameter 'addr.type' is missing",
    ),
    ('{"type":', "JSON parse error, premature EOI"),
]

OTHERS = [
    (("--blockdev",), "--blockdev: expected one argument"),
    ((*BLOCKDEV, *BLOCKDEV), "--blockdev: Duplicate nodes with node-name='d'"),
    ((*BLOCKDEV, "--blockdev", "raw,node-name=r,file=d,size=z"), "'size' expects a size from 0 to"),
    (
        (*BLOCKDEV, "--blockdev", "raw,node-name=r,file=d,size=1G"),
        "is greater than the size of the containing file (1048576)",
    ),
    (
        (*BLOCKDEV, "--blockdev", "raw,node-name=r,file=d,offset=2M"),
        "'offset': 2097152 is greater than",
    ),
    (
        (*BLOCKDEV, "--blockdev", "raw,node-name=r,file=d,size=1000"),
        "'size': 1000 is not a multiple of 512",
    ),
    ((*BLOCKDEV, *EXPORT, *EXPORT), "--export id=e: this id is in use"),
    ((*EXPORT,), "--export id=e: Cannot find node 'd'"),
    (
        (BLOCKDEV[0], BLOCKDEV[1] + ",read-only=on", EXPORT[0], EXPORT[1] + ",writable=on"),
        "--export id=e: Block node 'd' is read-only",
    ),
    (("--object", "iothread"), "--object iothread: Parameter 'id' is missing"),
    (("--object", "iothread,id="), "--object iothread: Parameter 'id' expects an identifier"),
    (
        ("--object", '{"qom-type":"iothread","id":5}'),
        "expects an identifier (a letter, then letters, digits, '-', '.' or '_'), not '5'",
    ),
    (("--object", "iothread,id=t,typo=1"), "--object iothread: Parameter 'typo' is unexpected"),
    (("--object", "iothread,id=t,poll-max-ns=-1"), "'poll-max-ns' expects a number from 0 to"),
    (("--object", f"iothread,id=t,poll-max-ns={2**64}"), f"not '{2**64}'"),
    (
        ("--object", "iothread,id=t", "--object", "iothread,id=t"),
        "--object iothread,id=t: this id is in use",
    ),
    (("--object", "tls-creds-x509,id=s"), "--object: type 'tls-creds-x509' is not supported"),
    (("--object", "secret,id=s"), "--object secret,id=s: Either 'file' or 'data' must be provided"),
    (("--object", "secret,id=s,data=x,format=y"), "does not accept value 'y'"),
    (
        ("--object", "throttle-group,id=s,limits.bps-total=1,x-bps-read=1"),
        "--object throttle-group: 'bps-total' cannot be used with 'bps-read' or 'bps-write'",
    ),
    (
        ("--object", "throttle-group,id=s,limits.typo=1"),
        "--object throttle-group: Parameter 'limits.typo' is unexpected",
    ),
    (("--blockdev", "throttle,throttle-group=x,file.driver=null-co"), "group 'x' does not exist"),
    (("--monitor", "chardev=m"), "--monitor: not supported by this version"),
    (("--monitor",), "--monitor: not supported by this version"),
    (("--chardev=stdio,id=m",), "--chardev: not supported by this version"),
    (("--nbd-server", "addr.type=unix"), "--nbd-server: not supported by this version"),
    (("disk.img",), "unrecognized arguments: disk.img"),
    (("--trace", "nope=1"), "Invalid parameter 'nope'"),
    (("--data-path", "c"), "--data-path: invalid choice: 'c'"),
    ((*BLOCKDEV, *EXPORT, "--pidfile", "nowhere/pid"), "--pidfile nowhere/pid: No such file"),
]
CASES: list[tuple[tuple[str, ...], str, str]] = [
    *((("--blockdev", text), "--blockdev", message) for text, message in BLOCKDEVS),
    *(((*BLOCKDEV, "--export", text), "--export", message) for text, message in EXPORTS),
    *((words, "", message) for words, message in OTHERS),
]


@pytest.mark.parametrize("program", ["vhostblk-storage-daemon", "vhostblk storage-daemon"])
@pytest.mark.parametrize(
    ("words", "option", "message"), CASES, ids=[" ".join(words)[-50:] for words, _, _ in CASES]
)
def test_storage_daemon_refuses(
    program: str,
    words: tuple[str, ...],
    option: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    sockets: list[str],
    log: list[str],
) -> None:
    if program == "vhostblk storage-daemon":
        said = complain(cli.main, ("storage-daemon", *words), capsys)
    else:
        said = complain(cli.storage_daemon_main, words, capsys)
    assert said.startswith(option)
    assert message in said
    assert (sockets, log) == ([], [])


@pytest.mark.parametrize(
    ("addr", "message"),
    [
        ("addr.type=unix,addr.path=", "--export id=f: socket path '': not a path"),
        (
            "addr.type=unix,addr.path=nowhere/s",
            "--export id=f: socket path nowhere/s: No such file",
        ),
        (
            "addr.type=unix,addr.path=sock",
            "--export id=f: socket path sock: somebody listens there",
        ),
        ("addr.type=fd,addr.str=999", "--export id=f: fd 999 is not a socket: Bad file descriptor"),
    ],
)
def test_one_export_that_cannot_listen_is_the_end_of_all(
    addr: str, message: str, capsys: pytest.CaptureFixture[str], log: list[str], folder: Path
) -> None:
    before = set(os.listdir(folder))
    second = f"vhost-user-blk,id=f,node-name=d,{addr}"
    said = complain(cli.main, ("storage-daemon", *BLOCKDEV, *EXPORT, "--export", second), capsys)
    assert message in said
    assert log == []  # the first one was never served
    assert set(os.listdir(folder)) == before


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (("--block-drv-rw-whitelist", "raw"), "Driver 'file' is not whitelisted"),
        (("--block-drv-ro-whitelist", "raw,file"), "'file' can only be used for read-only devices"),
        (
            ("--block-drv-rw-whitelist=raw", "--block-drv-ro-whitelist=file,raw,file"),
            "'file' can only be used for read-only devices",
        ),
        (
            ("--block-drv-ro-whitelist", "file,fiel"),
            "Unknown driver 'fiel' for '--block-drv-ro-whitelist'",
        ),
    ],
)
def test_drivers_that_are_not_on_the_list_are_refused(
    lists: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str], log: list[str]
) -> None:
    """Row B03.4: a read-only node may use what a writable one may not, and children count too."""
    assert message in complain(cli.storage_daemon_main, (*lists, *BLOCKDEV, *EXPORT), capsys)
    # What the lists allow comes as far as the next mistake.
    raw = ("--blockdev", "raw,node-name=d,file.driver=file,file.filename=disk.img,read-only=on")
    more = ("--block-drv-rw-whitelist", "null-co", "--block-drv-ro-whitelist", "raw,file")
    lost = ("--export", GOOD.replace("node-name=d", "node-name=x"))
    said = complain(cli.storage_daemon_main, (*more, *raw, *lost), capsys)
    assert "Cannot find node 'x'" in said


def test_a_failure_says_one_line_on_stderr_and_nothing_on_stdout(folder: Path) -> None:
    """A process of its own, without the test's logging."""
    words = [sys.executable, "-m", "vhostblk", "storage-daemon", *BLOCKDEV, *EXPORT]
    words += ["--export", "vhost-user-blk,id=f,node-name=d,addr.type=unix,addr.path=nowhere/s"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "vhostblk: --export id=f: socket path nowhere/s: No such file or directory\n"
    )


def test_export_that_no_descriptor_is_left_for_is_named(folder: Path) -> None:
    """Who has hundreds of them learns how far the limit goes."""
    words = [sys.executable, "-m", "vhostblk", "storage-daemon"]
    for number in range(40):
        words += ["--blockdev", f"null-co,node-name=n{number},size=1M", "--export"]
        words += [
            f"vhost-user-blk,id=e{number},node-name=n{number},addr.type=unix,addr.path={number}"
        ]
    limited = ["sh", "-c", 'ulimit -n 60; exec "$@"', "sh", *words]
    done = subprocess.run(limited, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert re.fullmatch(
        r"vhostblk: --export id=e\d+: .*Too many open files \(EMFILE\)",
        done.stderr.splitlines()[-1],
    )
    assert not [name for name in os.listdir(folder) if name.isdigit()]
