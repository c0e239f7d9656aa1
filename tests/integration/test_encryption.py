"""Encrypted images: what QEMU writes is read here, and the reverse; and nothing gets past the encryption."""

from __future__ import annotations

import asyncio
import json
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.disks import read
from tests.qcow2_images import MIB, contents, create, qemu_img
from vhostblk.block.backend import BlockBackend
from vhostblk.block.crypto.secret import SecretConfig
from vhostblk.block.graph import BlockGraph
from vhostblk.block.host_extent import host_extent
from vhostblk.block.iov import IoVec
from vhostblk.cli.img.program import main as img_main
from vhostblk.cli.io.program import main as io_main
from vhostblk.cli.main import storage_daemon_main
from vhostblk.client.client import Client
from vhostblk.errors import ConfigError
from vhostblk.testing.daemon_process import DaemonProcess
from vhostblk.testing.plugin import DaemonStarter
from vhostblk.testing.requirements import require

SECRETS = [
    *("--object", "secret,id=a,data=hunter1"),
    *("--object", "secret,id=b,data=aHVudGVyMg==,format=base64"),
    *("--object", "secret,id=wrong,data=hunter1 "),
]
LUKS = "encrypt.format=luks,encrypt.key-secret=a,encrypt.iter-time=1"
Tool = Callable[..., None]

# Each command line costs QEMU's tool more than a second, because it finds out how fast the machine is.
OURS = {
    "luks": LUKS,
    "luks, version 2": f"{LUKS},compat=0.10",
    "luks, 512 byte clusters": f"{LUKS},cluster_size=512",
    "luks, subclusters": f"{LUKS},extended_l2=on",
    "luks, preallocated": f"{LUKS},preallocation=metadata",
    "luks, data file": f"{LUKS},data_file=disk.data",
    "luks, aes-128-cbc-essiv": f"{LUKS},encrypt.cipher-alg=aes-128,encrypt.cipher-mode=cbc,encrypt.ivgen-alg=essiv",
    "luks, aes-192-xts-plain": f"{LUKS},encrypt.cipher-alg=aes-192,encrypt.ivgen-alg=plain",
    "luks, aes-256-ctr": f"{LUKS},encrypt.cipher-mode=ctr,encrypt.hash-alg=sha512",
    "luks, aes-256-ecb": f"{LUKS},encrypt.cipher-mode=ecb,encrypt.hash-alg=sha1",
    "aes": "encrypt.format=aes,encrypt.key-secret=a",
}
THEIRS = ("luks", "aes")


@pytest.fixture(autouse=True)
def _tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("qemu-img")
    require("qemu-io")
    monkeypatch.chdir(tmp_path)


def our_img(*words: str) -> None:
    command, *others = words
    with_secrets = [command, *SECRETS, *others]
    if command == "info":
        with_secrets = list(words)
    assert img_main(with_secrets, "vhostblk-img") == 0


def their_img(*words: str) -> None:
    qemu_img(words[0], *SECRETS, *words[1:])


def our_io(image: str, *commands: str) -> int:
    return io_main(
        [*SECRETS, "--image-opts", image, *(word for one in commands for word in ("-c", one))],
        "vhostblk-io",
    )


def their_io(image: str, *commands: str) -> None:
    words = [word for one in commands for word in ("-c", one)]
    done = subprocess.run(
        ["qemu-io", *SECRETS, "--image-opts", image, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout + done.stderr


def opts(name: str = "disk", secret: str = "a", **more: str) -> str:
    others = "".join(f",{key.replace('__', '.')}={value}" for key, value in more.items())
    return f"driver=qcow2,file.filename={name},encrypt.key-secret={secret}{others}"


def facts(image: Path | str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(qemu_img("info", "--output=json", image))
    return found


@pytest.mark.parametrize(
    ("shape", "maker"),
    [*((shape, our_img) for shape in OURS), *((shape, their_img) for shape in THEIRS)],
)
def test_both_read_what_the_other_has_written(
    shape: str, maker: Tool, capfd: pytest.CaptureFixture[str]
) -> None:
    maker("create", "-q", "-f", "qcow2", "-o", OURS[shape], "disk", "2M")
    before = "read -P 0 1M 1M" if "preallocated" not in shape else "read 1M 1M"
    their_io(opts(), "write -P 7 0 300k", "write -P 8 65024 1024", before)
    assert our_io(opts(), "read -P 7 0 65024", "read -P 8 65024 1k", "read -P 7 66048 241152") == 0
    assert (
        our_io(opts(), before, "write -P 9 1M 200k", "write -P 10 77 1001", "write -z 128k 64k")
        == 0
    )
    their_io(
        opts(),
        *("read -P 7 0 77", "read -P 10 77 1001", "read -P 7 1078 63946", "read -P 8 65024 1k"),
        *("read -P 0 128k 64k", "read -P 7 192k 100k", "read -P 9 1M 200k"),
    )
    their_img("check", "-q", "--image-opts", opts())
    our_img("check", "-q", "--image-opts", opts())
    capfd.readouterr()
    our_img("info", "--output=json", "disk")
    assert json.loads(capfd.readouterr().out) == facts("disk")
    assert b"\7" * 64 not in Path("disk").read_bytes()


def test_other_passwords_open_what_both_have_changed(capfd: pytest.CaptureFixture[str]) -> None:
    our_img("create", "-q", "-f", "qcow2", "-o", LUKS, "disk", "1M")
    assert our_io(opts(), "write -P 7 0 64k") == 0
    change = ["amend", "--image-opts", "-o"]
    add = "encrypt.state=active,encrypt.new-secret=b,encrypt.iter-time=1"
    our_img(*change, f"{add},encrypt.keyslot=3", opts())
    their_io(opts(secret="b"), "read -P 7 0 64k")
    their_img(*change, "encrypt.state=inactive,encrypt.old-secret=a", opts(secret="b"))
    assert our_io(opts(secret="b"), "read -P 7 0 64k") == 0
    capfd.readouterr()
    assert our_io(opts(), "read 0 512") == 1
    assert "Invalid password, cannot unlock any keyslot" in capfd.readouterr().err
    their_img(*change, add.replace("=b", "=a"), opts(secret="b"))
    our_img(*change, "encrypt.state=inactive,encrypt.keyslot=3", opts())
    their_io(opts(), "read -P 7 0 64k")
    slots = facts("disk")["format-specific"]["data"]["encrypt"]["slots"]
    assert [slot["active"] for slot in slots] == [True] + [False] * 7
    their_img("check", "-q", "--image-opts", opts())


def test_chain_of_encrypted_images_is_converted_committed_and_rebased(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    plain = random.Random(1).randbytes(MIB)
    Path("plain").write_bytes(plain)
    our_img("convert", "-O", "qcow2", "-o", LUKS, "plain", "base")
    words = ["-o", LUKS.replace("=a,", "=b,"), "-u", "-b", "base", "-F", "qcow2"]
    our_img("create", "-q", "-f", "qcow2", *words, "top", "1M")
    both = opts("top", "b", backing__driver="qcow2", backing__file__filename="base")
    both += ",backing.encrypt.key-secret=a"
    assert our_io(both, "write -P 5 1000 100000") == 0
    expected = plain[:1000] + b"\5" * 100000 + plain[101000:]
    for convert in (our_img, their_img):
        convert("convert", "-O", "raw", "--image-opts", both, "out")
        assert Path("out").read_bytes() == expected
    our_img("commit", "--image-opts", both)
    their_img("convert", "-O", "raw", "--image-opts", opts("base"), "out")
    assert Path("out").read_bytes() == expected
    our_img("rebase", "-b", "", "--image-opts", both)
    alone = opts("top", "b")
    our_img("compare", "--image-opts", alone, opts("base"))
    their_img("check", "-q", "--image-opts", alone)
    assert contents(create(tmp_path / "none", 512), tmp_path) == bytes(512)


def test_disk_that_grows_with_room_for_it_reads_as_zeroes() -> None:
    for number, shape in enumerate(("luks", "luks, version 2", "luks, subclusters", "aes")):
        name = f"disk{number}"
        our_img("create", "-q", "-f", "qcow2", "-o", OURS[shape], name, "1M")
        for mode, size in (("metadata", "2M"), ("full", "3M"), ("off", "4M")):
            our_img("resize", "-q", f"--preallocation={mode}", "--image-opts", opts(name), size)
        their_io(opts(name), "read -P 0 0 4M", "write -P 1 1M 512", "read -P 0 1049088 512")
        their_img("check", "-q", "--image-opts", opts(name))


def test_snapshots_stay_readable() -> None:
    our_img("create", "-q", "-f", "qcow2", "-o", LUKS, "disk", "1M")
    assert our_io(opts(), "write -P 1 0 128k") == 0
    our_img("snapshot", "-q", "-c", "one", "--image-opts", opts())
    assert our_io(opts(), "write -P 2 0 64k") == 0
    their_io(opts(), "read -P 2 0 64k", "read -P 1 64k 64k")
    our_img("snapshot", "-q", "-a", "one", "--image-opts", opts())
    their_io(opts(), "read -P 1 0 128k")


def test_luks_volume_is_the_one_that_qemu_makes(capfd: pytest.CaptureFixture[str]) -> None:
    volume = "driver=luks,key-secret={},file.filename=disk".format
    our_img("create", "-q", "-f", "luks", "-o", "key-secret=a,iter-time=1", "disk", "1M")
    their_io(volume("a"), "write -P 7 0 1M")
    assert our_io(volume("a"), "read -P 7 0 1M", "write -P 8 77 5000") == 0
    their_io(volume("a"), "read -P 7 0 77", "read -P 8 77 5000", "read -P 7 5077 512")
    add = "state=active,new-secret=b,iter-time=1"
    our_img("amend", "-o", add, "--image-opts", volume("a"))
    their_io(volume("b"), "read -P 8 77 5000")
    our_img("resize", "-q", "--image-opts", volume("b"), "2M")
    capfd.readouterr()
    our_img("info", "--output=json", "disk")
    assert json.loads(capfd.readouterr().out) == facts("disk")
    assert our_io("file.filename=disk,key-secret=b", "read -P 8 77 5000") == 0  # by its magic


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("driver=qcow2", "Parameter 'encrypt.key-secret' is required for cipher"),
        ("driver=qcow2,encrypt.key-secret=nosuch", "No secret with id 'nosuch'"),
        ("driver=qcow2,encrypt.key-secret=wrong", "Invalid password, cannot unlock any keyslot"),
        (
            "driver=qcow2,encrypt.format=aes,encrypt.key-secret=a",
            "Header reported 'luks' encryption format but options specify 'aes'",
        ),
    ],
)
def test_who_cannot_open_an_image_is_told_why_and_shown_no_secret(
    options: str, complaint: str, capfd: pytest.CaptureFixture[str]
) -> None:
    our_img("create", "-q", "-f", "qcow2", "-o", LUKS, "disk", "1M")
    capfd.readouterr()
    assert our_io(f"{options},file.filename=disk", "read 0 512") == 1
    said = capfd.readouterr()
    assert said.err == f"vhostblk-io: can't open: {complaint}\n"
    assert "hunter" not in said.out + said.err


def test_damaged_keys_are_refused_in_the_words_of_qemu(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    our_img("create", "-q", "-f", "qcow2", "-o", LUKS, "whole", "1M")
    whole = Path("whole").read_bytes()
    start = whole.index(b"LUKS\xba\xbe")
    rnd = random.Random(1)
    for number in range(12):
        data = bytearray(whole)
        at = rnd.choice([*range(108), *range(164), 208, *range(248, 256)])
        if 108 <= at < 164:
            at = 44
        data[start + at] ^= rnd.randrange(1, 256)
        Path("disk").write_bytes(data)
        done = subprocess.run(
            ["qemu-io", *SECRETS, "--image-opts", opts(), "-c", "read 0 512"],
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=60,
        )
        capfd.readouterr()
        status = our_io(opts(), "read 0 512")
        ours = capfd.readouterr().err.replace("vhostblk-io", "qemu-io")
        assert status == done.returncode, (number, at, done.stderr, ours)
        if done.stderr.isascii() and done.stderr.isprintable():
            assert ours == done.stderr, (number, at)


def test_nobody_writes_past_the_encryption() -> None:
    """No extents of data, and what a guest's memory has is not changed by writing it."""
    our_img("create", "-q", "-f", "qcow2", "-o", LUKS, "disk", "1M")
    assert our_io(opts(), "write -P 7 0 64k") == 0

    async def scenario(disk: BlockBackend, graph: BlockGraph) -> None:
        node = disk.node
        assert node is not None
        assert node.is_encrypted
        assert not disk.prepares_writes
        assert await host_extent(node, 0, 4096) is None
        zeroes = await host_extent(node, 512 * 1024, 4096)
        assert zeroes is not None
        assert zeroes.fd is None
        memory = bytearray(random.Random(2).randbytes(4096))
        before = bytes(memory)
        await disk.pwritev(8192, IoVec.of(memory))
        assert memory == before
        assert await read(disk, 8192, 4096) == before
        with pytest.raises(ConfigError, match="No secret"):
            graph.secrets.content("b")

    with_encrypted("disk", scenario)
    assert random.Random(2).randbytes(512) not in Path("disk").read_bytes()


def with_encrypted(name: str, scenario: Any) -> None:
    async def run() -> None:
        graph = BlockGraph()
        graph.secrets.add(SecretConfig("a", "hunter1"))
        try:
            node = await graph.open_image(name, {"driver": "qcow2", "encrypt.key-secret": "a"})
            disk = BlockBackend(node, "test", writable=True)
            await scenario(disk, graph)
            await disk.close()
        finally:
            await graph.close_all()

    asyncio.run(run())


@pytest.mark.parametrize("data_path", ["native", "python"])
def test_guest_uses_an_encrypted_disk(
    daemon: DaemonStarter, socket_directory: Path, data_path: str
) -> None:
    our_img("create", "-q", "-f", "qcow2", "-o", LUKS, "disk", "4M")
    Path("password").write_text("hunter1")
    served = _serve(daemon, socket_directory / "s", "--data-path", data_path)
    model = bytearray(4 * MIB)
    rnd = random.Random(3)
    with Client.connect(socket_directory / "s") as client:
        for _ in range(40):
            length = rnd.choice([512, 4096, 70000 // 512 * 512])
            at = rnd.randrange(0, len(model) - length) // 512 * 512
            data = rnd.randbytes(length)
            client.write(at, data)
            model[at : at + length] = data
        client.flush()
        assert client.read(0, len(model)) == model
    served.stop()
    their_img("convert", "-O", "raw", "--image-opts", opts(), "out")
    assert Path("out").read_bytes() == model
    their_img("check", "-q", "--image-opts", opts())


def _serve(daemon: DaemonStarter, socket: Path, *words: str) -> DaemonProcess:
    return daemon(
        *("serve", "disk", "--format", "qcow2", "--socket", str(socket)),
        *("--object", "secret,id=a,file=password", "--key-secret", "a"),
        *words,
        sockets=[socket],
    )


def test_daemon_refuses_the_old_encryption(capfd: pytest.CaptureFixture[str]) -> None:
    our_img("create", "-q", "-f", "qcow2", "-o", OURS["aes"], "disk", "1M")
    capfd.readouterr()
    words = ["--object", "secret,id=a,data=hunter1", "--blockdev"]
    words.append("qcow2,node-name=d,file.driver=file,file.filename=disk,encrypt.key-secret=a")
    assert storage_daemon_main(words) == 1
    said = capfd.readouterr().err
    assert "image tools only" in said
    assert "hunter" not in said


def test_image_goes_back_to_version_2_unless_a_snapshot_would_need_encrypted_zeroes(
    capfd: pytest.CaptureFixture[str],
) -> None:
    Path("base").write_bytes(b"\3" * MIB)
    back = ["amend", "-o", "compat=0.10", "--image-opts"]
    for name, backing in (("alone", []), ("top", ["-b", "base", "-F", "raw"])):
        our_img("create", "-q", "-f", "qcow2", "-o", LUKS, *backing, name, "1M")
        assert our_io(opts(name), "write -P 7 0 256k", "write -z 64k 64k") == 0
    our_img(*back, opts("alone"))
    their_io(opts("alone"), "read -P 7 0 64k", "read -P 0 64k 64k", "read -P 7 128k 128k")
    our_img("snapshot", "-q", "-c", "one", "--image-opts", opts("top"))
    assert img_main([*back[:1], *SECRETS, *back[1:], opts("top")], "img") == 1
    assert "zero clusters in snapshots" in capfd.readouterr().err
    our_img("snapshot", "-q", "-d", "one", "--image-opts", opts("top"))
    our_img(*back, opts("top"))
    their_io(opts("top"), "read -P 7 0 64k", "read -P 0 64k 64k", "read -P 3 512k 64k")
    their_img("check", "-q", "--image-opts", opts("top"))
