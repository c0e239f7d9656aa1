"""A soak: daemons that serve restless guests, strangers that mean no good, and an end of a daemon now and then.

Theory of operation. There are two long-lived daemons, one with the engine and one without, and one that is killed or
stopped all the time. Each disk has a guest in a thread of its own (`guest`). The thread of the soak ends daemons and is
nasty to them (`hostile`). After each round all guests leave, and no daemon may hold more than it did at first
(`figures`).
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from tests.soak.daemons import Disk, Held, LongLived, ShortLived, at_rest, settled
from tests.soak.figures import Ledger, table, total
from tests.soak.guest import SoakGuest
from tests.soak.hostile import Intruder
from vhostblk.client.client import Client
from vhostblk.testing.daemon_process import TRACEBACK

__all__ = ["Soak", "SoakError"]

_DATA_PATHS = ("native", "python")
_LONGEST_LIFE = 2.0  # seconds; the shortest is none
_CROWD = 0.05  # seconds between two nasty things
_LISTENING = 30.0
_OVERTIME = 300.0


class SoakError(AssertionError):
    """Something is not as promised."""


class Soak:
    """See the module.

    Args:
        folder: for images and sockets; its path has to be short.
        seed: of the choices.

    Context: one thread, not the guests'. Owns: the daemons.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._choice = random.Random(seed)
        self._seconds = 0.0
        self._rounds = 0
        self._counts: Counter[str] = Counter()
        self._failed = threading.Event()
        self._images: list[str] = []
        with ExitStack() as until_started:
            self._engine = LongLived(
                _disks(folder, "e", "raw", "direct", "qcow2", "faulty", "memory"), "native"
            )
            until_started.callback(self._engine.give_up)
            self._python = LongLived(_disks(folder, "p", "raw", "qcow2", "memory"), "python")
            until_started.callback(self._python.give_up)
            self._mortal = ShortLived(_disks(folder, "m", "raw", "direct", "qcow2"))
            until_started.callback(self._mortal.close, check=False)
            self._begin()
            self._resources = until_started.pop_all()

    def _begin(self) -> None:
        self._ledgers = {
            "engine": Ledger("with the engine", _first(self._engine)),
            "python": Ledger("without it", _first(self._python)),
        }
        for path in reversed(_DATA_PATHS):
            self._mortal.replace(path, orderly=True)
            self._mortal.wait_until_it_listens()
            name = f"that ends, {'with' if path == 'native' else 'without'} the engine"
            self._ledgers[path + " mortal"] = Ledger(name, _first(self._mortal))
        daemons = (self._engine, self._python, self._mortal)
        self._guests = [
            SoakGuest(daemon, disk, self._choice.randrange(1 << 30), self._failed)
            for daemon in daemons
            for disk in daemon.disks
            if disk.kind != "memory"
        ]
        self._intruders = [
            Intruder(daemon.disks[-1], daemon.disks[:-1], self._choice.randrange(1 << 30))
            for daemon in (self._engine, self._python)
        ]

    def round(self, seconds: float) -> str:
        """Soak that long, and look at what is left; says what was done.

        Raises:
            SoakError: something is wrong.
        """
        began = time.monotonic()
        threads = [
            threading.Thread(target=guest.run, args=(began + seconds,), name=guest.name)
            for guest in self._guests
        ]
        for thread in threads:
            thread.start()
        try:
            while busy := [thread.name for thread in threads if thread.is_alive()]:
                if self._failed.is_set():
                    break
                if time.monotonic() > began + seconds + _OVERTIME:
                    raise SoakError(self._story(f"{', '.join(busy)} do not end"))
                self._disturb()
        except BaseException:
            self._failed.set()
            raise
        finally:
            for thread in threads:
                thread.join()
        self._raise_failures()
        self._look()
        self._seconds += time.monotonic() - began
        self._rounds += 1
        requests = sum(guest.work[0] for guest in self._guests)
        ends = self._counts["daemons killed"] + self._counts["daemons stopped in order"]
        held = ", ".join(
            f"{ledger.rounds[-1].memory >> 20} MiB {ledger.name}"
            for ledger in self._ledgers.values()
            if ledger.rounds
        )
        return (
            f"round {self._rounds}: {self._seconds:.0f} s, {requests} requests, {ends} ends; {held}"
        )

    def _disturb(self) -> None:
        """Nasty things for the time of one life, and the end of that."""
        end = time.monotonic() + self._choice.random() ** 2 * _LONGEST_LIFE
        while time.monotonic() < end and not self._failed.is_set():
            self._choice.choice(self._intruders).act()
            self._failed.wait(min(_CROWD, max(end - time.monotonic(), 0)))
        orderly = self._choice.random() < 0.3
        self._mortal.replace(self._choice.choice(_DATA_PATHS), orderly=orderly)
        self._counts["daemons stopped in order" if orderly else "daemons killed"] += 1

    def _raise_failures(self) -> None:
        for guest in self._guests:
            if guest.failure is not None:
                raise SoakError(self._story(guest.name)) from guest.failure
        for daemon in (self._engine, self._python):
            if daemon.has_ended() or TRACEBACK in daemon.output:
                raise SoakError(self._story("a daemon"))

    def _story(self, who: str) -> str:
        said = "\n".join(
            daemon.output[-3000:] for daemon in (self._engine, self._python, self._mortal)
        )
        return f"{who}, round {self._rounds + 1}, {dict(self._all_counts())}\n{said}"

    def _look(self) -> None:
        """Nobody is there: nothing is held."""
        self._mortal.wait_until_it_listens()
        for name, pid in (
            ("engine", self._engine.pid),
            ("python", self._python.pid),
            (self._mortal.data_path + " mortal", self._mortal.pid),
        ):
            ledger = self._ledgers[name]
            held, complaints = settled(pid, ledger.complaints)
            ledger.rounds.append(held)
            if complaints:
                raise SoakError("\n".join([*complaints, self._story(name)]))

    def _all_counts(self) -> Counter[str]:
        everybody = [guest.counts for guest in self._guests]
        return total([self._counts, *everybody, *(other.counts for other in self._intruders)])

    def figures(self) -> str:
        """What was done, as a table."""
        work = [guest.work for guest in self._guests]
        facts = [
            ("seconds", f"{self._seconds:.0f}"),
            ("rounds", str(self._rounds)),
            ("guests at a time", str(len(self._guests))),
            ("requests", str(sum(each[0] for each in work))),
            ("of these, failed on purpose", str(sum(each[1] for each in work))),
            (
                "MiB read that had to have a certain content",
                str(sum(each[2] for each in work) >> 20),
            ),
            ("images in the end", ", ".join(self._images)),
        ]
        return table(facts, self._all_counts(), list(self._ledgers.values()))

    def finish(self) -> None:
        """Stop everything in order, and look at the images."""
        self._engine.stop()
        self._python.stop()
        self._mortal.close(check=True)
        self._resources.pop_all()
        for daemon in (self._engine, self._python, self._mortal):
            for disk in daemon.disks:
                if state := disk.check(may_leak=daemon is self._mortal):
                    self._images.append(f"{disk.name} {state}")

    def give_up(self) -> None:
        """End whatever runs. Idempotent."""
        self._failed.set()
        self._resources.close()


def _disks(folder: Path, prefix: str, *kinds: str) -> list[Disk]:
    return [Disk(f"{prefix}-{kind}", kind, folder) for kind in kinds]


def _first(daemon: LongLived | ShortLived) -> Held:
    """What a daemon holds when each of its disks has had a front-end: what is made on first use is made."""
    if isinstance(daemon, ShortLived):
        daemon.wait_until_it_listens()
    for disk in daemon.disks:
        for _ in range(2):
            with Client.connect(disk.socket, queues=4, timeout=_LISTENING) as client:
                for queue in range(4):
                    client.read(0, 512, queue=queue)
    return at_rest(daemon.pid)
