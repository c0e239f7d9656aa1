"""Runs a small Linux guest in QEMU on vhost-user-blk disks.

Theory of operation: the guest's serial port is the kernel's console, only listened to. On a virtio
serial port (VIRTIO 1.2 §5.3) a shell waits for commands; each is answered with its output and a
line that holds a token and the exit status, so that kernel messages never mix with the output of a
command. (A second 16550 would be simpler, but Linux 6.1 and QEMU 7.2 lose interrupts between them
about once in three boots, and with the interrupt the last bytes.) Guest memory is a shared memfd,
as vhost-user demands (vhost-user, "Memory regions description"). A guest that does not do what is
asked in time costs an error with the last lines of its console, and its QEMU is gone when the
error arrives.

Two ways to use it::

    result = run_guest("mkfs.ext4 /dev/vda && mount /dev/vda /mnt && ...", disks=[disk])

    with Guest([GuestDisk(socket, reconnect_seconds=1)]) as guest:
        writing = guest.submit("dd if=/dev/urandom of=/dev/vda bs=1M")
        ...                                  # do something to the daemon
        assert writing.result(timeout=60).status == 0
        guest.power_off()

This module knows nothing of vhostblk's daemon: any vhost-user-blk back-end will do.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from vhostblk.errors import StateError, VhostBlkError
from vhostblk.testing.accelerator import Accelerator, choose_accelerator, find_qemu
from vhostblk.testing.console import Transcript, pump
from vhostblk.testing.initramfs import (
    VIRTIO_MODULES,
    GuestKernel,
    MissingToolError,
    build_initramfs,
)

__all__ = [
    "CommandResult",
    "Guest",
    "GuestDisk",
    "GuestResult",
    "GuestRunError",
    "PendingCommand",
    "missing_guest",
    "run_guest",
]

BOOT_SECONDS = 15.0
"""Times the accelerator's slowness: how long a guest may take to its shell on a busy machine."""

_READY = "the guest's shell is ready"

_INIT = f"""#!/bin/sh
export PATH=/bin:/sbin:/usr/bin:/usr/sbin
/bin/busybox --install -s /bin 2>/dev/null
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
while read -r module; do insmod "/modules/$module"; done </modules/order
# The port appears when QEMU has answered the driver, which insmod does not wait for.
# Nor can it be opened as soon as its file is there, and a shell whose exec fails ends.
until (: <>/dev/vport0p1) 2>/dev/null; do usleep 1000; done
# Opened once and for both ways, with no terminal in between: no echo, no prompt, no lost bytes.
exec 3<>/dev/vport0p1
# Waits until QEMU has connected the port; a shell that began to read earlier would see its end.
echo "{_READY}" >&3
sh <&3 >&3 2>&1
echo "the guest's shell has ended"
poweroff -f
"""


class GuestRunError(VhostBlkError):
    """A guest did not start, stopped too early or did not answer in time.

    Args:
        what: one line.
        console: what its kernel and QEMU said; the last lines become part of the message.
    """

    def __init__(self, what: str, console: str = "") -> None:
        tail = "\n".join(f"  | {line.rstrip()}" for line in console.splitlines()[-25:])
        super().__init__(f"{what}\n{tail}" if tail else what)
        self.what = what
        self.console = console


@dataclass(frozen=True)
class GuestDisk:
    """A vhost-user-blk-pci device.

    Args:
        socket: path the back-end listens on.
        queues: num-queues; None leaves it to QEMU (one per processor).
        reconnect_seconds: QEMU tries again this often when the back-end has gone; None: never.
        options: more device options, for example {"queue-size": "64", "config-wce": "off"}.
    """

    socket: Path | str
    queues: int | None = None
    reconnect_seconds: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)

    def arguments(self, index: int) -> list[str]:
        """QEMU's options for this disk, the `index`th of its guest."""
        path = os.fspath(self.socket).replace(",", ",,")
        chardev = f"socket,id=disk{index},path={path}"
        if self.reconnect_seconds is not None:
            chardev += f",reconnect={self.reconnect_seconds}"
        device = f"vhost-user-blk-pci,chardev=disk{index}"
        if self.queues is not None:
            device += f",num-queues={self.queues}"
        for name, value in self.options.items():
            device += f",{name}={value.replace(',', ',,')}"
        return ["-chardev", chardev, "-device", device]


@dataclass(frozen=True)
class CommandResult:
    """What a command said (stdout and stderr together), and its exit status."""

    status: int
    output: str


@dataclass(frozen=True)
class GuestResult(CommandResult):
    """The same of a whole run, with the kernel's console and the time from start to power-off."""

    console: str
    seconds: float
    accelerator: str


class PendingCommand:
    """A command the guest is working on."""

    def __init__(self, guest: Guest, command: str, begin: bytes, end: bytes) -> None:
        self._guest = guest
        self._command = command
        self._begin = begin
        self._end = end

    def result(self, timeout: float = 60.0) -> CommandResult:
        """Waits for the command's end, `timeout` seconds (at TCG's speed).

        Raises:
            GuestRunError: it did not end in time, or the guest ended first.
        """
        return self._guest._finish(self._command, self._begin, self._end, timeout)


class Guest:
    """A running guest; a context manager that ends with no process left, whatever happens.

    Args:
        disks: become /dev/vda, /dev/vdb, ... in this order.
        cpus: virtual processors; without `GuestDisk.queues` also the queues of each disk.
        memory_mib: size of the shared guest memory.
        huge_pages: it is in huge pages of the host, of which there must be enough.
        programs: programs of the host to be had in the guest, with their libraries.
        modules: kernel modules to load, besides the virtio console's.
        kernel_arguments: added to the kernel's command line.
        extra_arguments: added to QEMU's.
        accelerator: None to try.
        incoming: where a guest comes from that runs elsewhere, as `-incoming` says it; it is not waited for.

    Context: any one thread.
    Owns: QEMU, a thread that reads its console, its descriptors.
    """

    def __init__(
        self,
        disks: Sequence[GuestDisk] = (),
        *,
        cpus: int = 1,
        memory_mib: int = 256,
        huge_pages: bool = False,
        programs: tuple[str, ...] = ("mkfs.ext4",),
        modules: tuple[str, ...] = VIRTIO_MODULES,
        kernel_arguments: str = "",
        extra_arguments: Iterable[str] = (),
        accelerator: Accelerator | None = None,
        incoming: str | None = None,
    ) -> None:
        self._incoming = incoming
        self._disks = tuple(disks)
        self._cpus = cpus
        self._memory_mib = memory_mib
        self._huge_pages = huge_pages
        self._programs = programs
        self._modules = modules
        self._kernel_arguments = kernel_arguments
        self._extra_arguments = tuple(extra_arguments)
        self._accelerator = accelerator
        self._console = Transcript()
        self._talk = Transcript()
        self._commands = 0
        self._qemu: subprocess.Popen[bytes] | None = None
        self._shell: socket.socket | None = None
        self._resources = contextlib.ExitStack()

    def __enter__(self) -> Guest:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def accelerator(self) -> Accelerator:
        """How its processors run; known once it has started."""
        if self._accelerator is None:
            self._accelerator = choose_accelerator()
        return self._accelerator

    @property
    def console(self) -> str:
        """What the kernel, and QEMU itself, have said so far."""
        return self._console.text()

    @property
    def pid(self) -> int:
        """QEMU's process id."""
        return self._process().pid

    def run(self, command: str, timeout: float = 60.0) -> CommandResult:
        """Runs a shell command, or a script of many lines, in the guest and waits for its end.

        Each command has a shell of its own: variables and the current folder do not last. What
        is started with & goes on, if its output is redirected.

        Raises:
            GuestRunError: it did not end within `timeout` seconds, or the guest ended first.
        """
        return self.submit(command).result(timeout)

    def check(self, command: str, timeout: float = 60.0) -> str:
        """Like `run`; returns the output and raises GuestRunError unless the status is 0."""
        result = self.run(command, timeout)
        if result.status != 0:
            what = f"in the guest, {_brief(command)} ended with status {result.status}"
            raise GuestRunError(f"{what}: {result.output.strip()[-2000:]}", self.console)
        return result.output

    def submit(self, command: str) -> PendingCommand:
        """Starts a command and does not wait; the next one waits for it in the guest's shell."""
        if self._shell is None:
            raise StateError("the guest is not running")
        self._commands += 1
        begin, end = f"begin-of-command-{self._commands}", f"end-of-command-{self._commands}"
        line = f"echo {begin}; sh -c {shlex.quote(command)} </dev/null; "
        line += f"printf '\\n{end} %d\\n' $?\n"
        try:
            self._shell.sendall(line.encode())
        except OSError as error:
            raise GuestRunError(f"the guest has ended ({error})", self.console) from error
        return PendingCommand(self, command, f"{begin}\n".encode(), f"\n{end} ".encode())

    def wait_for_console(self, wanted: str, timeout: float = 60.0) -> None:
        """Waits until the kernel (or QEMU) has said `wanted`.

        Raises:
            GuestRunError: it has not within `timeout` seconds.
        """
        deadline = time.monotonic() + timeout
        if self._console.wait_for(wanted.encode(), start=0, deadline=deadline) is None:
            raise GuestRunError(f"nothing on the console about {wanted!r}", self.console)

    def power_off(self, timeout: float = 30.0) -> None:
        """Powers the guest off and waits until QEMU has ended well.

        File systems are not unmounted: that is the caller's business.

        Raises:
            GuestRunError: QEMU is still there after `timeout` seconds, or ended with an error.
        """
        self.submit("poweroff -f")
        try:
            status = self._process().wait(timeout)
        except subprocess.TimeoutExpired:
            raise GuestRunError(f"no power-off within {timeout:g} s", self.console) from None
        if status != 0:
            raise GuestRunError(f"QEMU ended with status {status}", self.console)

    def kill(self) -> None:
        """Ends QEMU as a crash would, and waits for its end."""
        self._process().send_signal(signal.SIGKILL)
        self._process().wait()

    def close(self) -> None:
        """Ends everything. Idempotent."""
        if self._qemu is not None and self._qemu.poll() is None:
            self._qemu.kill()
        self._resources.close()
        self._shell = None

    def _process(self) -> subprocess.Popen[bytes]:
        if self._qemu is None:
            raise StateError("the guest has not been started")
        return self._qemu

    def _start(self) -> None:
        kernel = GuestKernel.newest()
        modules = (*self._modules, "virtio_console")
        image = build_initramfs(kernel, _INIT, modules=modules, programs=self._programs)
        accelerator = self.accelerator
        with contextlib.ExitStack() as until_started:
            initramfs = os.memfd_create("initramfs")
            until_started.callback(os.close, initramfs)
            with open(initramfs, "wb", closefd=False) as file:
                file.write(image)
            shell, theirs = socket.socketpair()
            until_started.callback(theirs.close)
            self._resources.callback(shell.close)
            self._shell = shell
            self._qemu = subprocess.Popen(
                self._command(kernel, accelerator, initramfs, theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=(initramfs, theirs.fileno()),
            )
        self._resources.callback(self._qemu.wait)
        output = self._qemu.stdout
        if output is None:
            raise AssertionError("stdout is a pipe")
        self._resources.callback(output.close)
        streams = {output.fileno(): self._console, shell.fileno(): self._talk}
        self._resources.callback(pump(streams, "guest-console").join)
        if self._incoming is not None:
            return
        deadline = time.monotonic() + BOOT_SECONDS * accelerator.slowness
        if self._talk.wait_for(_READY.encode(), start=0, deadline=deadline) is None:
            why = "ended before" if self._talk.ended else "did not reach in time"
            raise GuestRunError(f"the guest {why} its shell ({accelerator.name})", self.console)

    def _command(
        self, kernel: GuestKernel, accelerator: Accelerator, initramfs: int, shell: int
    ) -> list[str]:
        memory = f"memory-backend-memfd,id=memory,size={self._memory_mib}M,share=on"
        if self._huge_pages:
            memory += ",hugetlb=on"
        append = f"console=ttyS0 quiet panic=-1 {self._kernel_arguments}".strip()
        if accelerator.name == "tcg":
            # A busy host has no time for the guest while its kernel counts interrupts, which then panics (x86).
            append += " no_timer_check"
        command = [find_qemu(), "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]
        command += [*accelerator.arguments, "-smp", str(self._cpus)]
        command += ["-m", f"{self._memory_mib}M", "-object", memory]
        command += ["-machine", "pc,memory-backend=memory"]
        command += ["-kernel", str(kernel.image), "-append", append]
        command += ["-initrd", f"/proc/self/fd/{initramfs}"]
        command += ["-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console"]
        # The first PCI device, so that the disks come after it in the order they were given.
        command += ["-device", "virtio-serial-pci", "-chardev", f"socket,id=shell,fd={shell}"]
        command += ["-device", "virtserialport,chardev=shell,name=shell,nr=1"]
        if self._incoming is not None:
            command += ["-incoming", self._incoming]
        for index, disk in enumerate(self._disks):
            command += disk.arguments(index)
        return [*command, *self._extra_arguments]

    def _finish(self, command: str, begin: bytes, end: bytes, timeout: float) -> CommandResult:
        deadline = time.monotonic() + timeout
        start = self._talk.wait_for(begin, start=0, deadline=deadline)
        after = status_end = None
        if start is not None:
            after = self._talk.wait_for(end, start=start, deadline=deadline)
        if after is not None:
            status_end = self._talk.wait_for(b"\n", start=after, deadline=deadline)
        if after is None or status_end is None:
            why = "the guest ended during" if self._talk.ended else f"not done in {timeout:g} s:"
            said = "" if start is None else self._talk.text(start)[-2000:].strip()
            raise GuestRunError(f"{why} {_brief(command)} (so far: {said!r})", self.console)
        output = self._talk.text(start or 0, after - len(end))
        return CommandResult(int(self._talk.text(after, status_end)), output)


def run_guest(
    script: str,
    disks: Sequence[GuestDisk] = (),
    *,
    timeout: float = 120.0,
    cpus: int = 1,
    memory_mib: int = 256,
    programs: tuple[str, ...] = ("mkfs.ext4",),
    extra_arguments: Iterable[str] = (),
    accelerator: Accelerator | None = None,
) -> GuestResult:
    """Boots a guest, runs a shell script in it, powers it off.

    Args:
        timeout: seconds the script may take; the boot has a deadline of its own.

    Raises:
        GuestRunError: the guest did not come up, did not end in time, or QEMU failed. A script
            that fails is a result with its status.
        MissingToolError: QEMU, a kernel, busybox or a program is not installed.
    """
    began = time.monotonic()
    with Guest(
        disks,
        cpus=cpus,
        memory_mib=memory_mib,
        programs=programs,
        extra_arguments=extra_arguments,
        accelerator=accelerator,
    ) as guest:
        done = guest.run(script, timeout)
        guest.power_off()
        seconds = time.monotonic() - began
        return GuestResult(done.status, done.output, guest.console, seconds, guest.accelerator.name)


def missing_guest() -> str | None:
    """Why no guest can be booted on this machine, or None if one can."""
    try:
        find_qemu()
        modules = (*VIRTIO_MODULES, "virtio_console")
        build_initramfs(GuestKernel.newest(), _INIT, modules=modules)
    except MissingToolError as error:
        return str(error)
    return None


def _brief(command: str) -> str:
    first = command.strip().splitlines()[0] if command.strip() else "an empty command"
    return repr(first if len(first) <= 60 else first[:57] + "...")
