"""What the guest runner tells QEMU, and what it does when QEMU is not as it should be."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhostblk.errors import StateError
from vhostblk.testing.accelerator import KVM, TCG, boots, choose_accelerator, find_qemu
from vhostblk.testing.guest import Guest, GuestDisk, GuestRunError
from vhostblk.testing.initramfs import MissingToolError


def test_disk_becomes_a_chardev_and_a_device() -> None:
    assert GuestDisk("/run/a.sock").arguments(0) == [
        "-chardev",
        "socket,id=disk0,path=/run/a.sock",
        "-device",
        "vhost-user-blk-pci,chardev=disk0",
    ]


def test_disk_passes_on_queues_reconnect_and_options() -> None:
    disk = GuestDisk(Path("/a"), queues=4, reconnect_seconds=1, options={"queue-size": "64"})
    assert disk.arguments(2) == [
        "-chardev",
        "socket,id=disk2,path=/a,reconnect=1",
        "-device",
        "vhost-user-blk-pci,chardev=disk2,num-queues=4,queue-size=64",
    ]


def test_commas_in_a_socket_path_are_doubled() -> None:
    assert "path=/a,,b" in GuestDisk("/a,b").arguments(0)[1]


def test_error_shows_the_last_lines_of_the_console() -> None:
    error = GuestRunError("no answer", "\n".join(f"line {number}" for number in range(100)))
    assert str(error).splitlines()[0] == "no answer"
    assert str(error).endswith("  | line 99")
    assert "line 70\n" not in str(error)


def test_guest_that_was_not_started_refuses_commands() -> None:
    guest = Guest()
    with pytest.raises(StateError, match="not running"):
        guest.run("true")
    with pytest.raises(StateError, match="not been started"):
        guest.kill()
    guest.close()


def test_accelerator_can_be_chosen_by_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VHOSTBLK_ACCELERATOR", "kvm")
    assert choose_accelerator() is KVM
    monkeypatch.setenv("VHOSTBLK_ACCELERATOR", "tcg")
    assert choose_accelerator() is TCG
    monkeypatch.setenv("VHOSTBLK_ACCELERATOR", "xen")
    with pytest.raises(MissingToolError, match="expected kvm or tcg"):
        choose_accelerator()


def test_missing_qemu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VHOSTBLK_QEMU", "no-such-qemu")
    with pytest.raises(MissingToolError, match="no-such-qemu is not installed"):
        find_qemu()


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ("echo 'Kernel panic: Unable to mount root fs on unknown-block'", True),
        ("echo 'reset before the first word of the kernel'", False),
        ("echo 'Unable to mount root fs'; exit 1", False),
        ("exec sleep 60", False),
    ],
)
def test_trial_boot_believes_only_the_kernels_own_words(
    tmp_path: Path, behaviour: str, expected: bool
) -> None:
    qemu = tmp_path / "qemu"
    qemu.write_text(f"#!/bin/sh\n{behaviour}\n")
    qemu.chmod(0o755)
    seconds = 0.3 if "sleep" in behaviour else 10.0
    assert boots(KVM, qemu, tmp_path / "vmlinuz", seconds) is expected
