"""Where programs start: what a short run does not need is imported when it is first used.

Scripts run image tools thousands of times, and most of such a run was reading modules. Theory of operation: a module
of `LATE` is there when somebody imports it, but executed when somebody looks into it. That is of use where modules are
imported as such (`import x`, `from package import x`), and harmless elsewhere. `importlib.util.LazyLoader` is the same
in principle; Python 3.11's executes a module when it is imported for the second time, and minds no threads.

A process ends as soon as all is done. It concerns only a process that was started here. Knows nothing about what the
programs do.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from _thread import RLock
from collections.abc import Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from importlib.abc import Loader

LATE = frozenset(
    {
        # What the standard library imports for what image tools do not do: TLS, signatures.
        *("asyncio.sslproto", "ssl", "inspect", "ipaddress"),
        *("asyncio.staggered", "traceback", "linecache", "locale", "pathlib"),
        *("tempfile", "json", "ctypes", "textwrap"),
        *("vhostblk.block.py_buffer", "vhostblk.block.throttle_group", "vhostblk.cli.objects"),
        *("vhostblk.block.image_info", "vhostblk.block.internal_snapshot"),
        *("vhostblk.block.create", "vhostblk.block.json_text", "vhostblk.block.qjson"),
        "vhostblk.cli.image_info_text",
        # What runs that only say something, as `--version`, have no use for: the block layer, and asyncio with it.
        *("vhostblk.cli.img.session", "vhostblk.cli.interruption"),
        # What is done with encrypted images.
        *("hashlib", "uuid", "vhostblk.block.crypto.luks", "vhostblk.block.crypto.luks_amend"),
        *("vhostblk.block.crypto.encrypted_file", "vhostblk.block.drivers.qcow2.encryption"),
        # What is done with qcow2 images, but not in every run.
        "vhostblk.block.drivers.qcow2.format_info",
        *("vhostblk.block.drivers.qcow2.create", "vhostblk.block.drivers.qcow2.layout"),
        *("vhostblk.block.drivers.qcow2.amend_options", "vhostblk.block.drivers.qcow2.emptying"),
        *("vhostblk.block.drivers.qcow2.measuring", "vhostblk.block.drivers.qcow2.repair"),
        *("vhostblk.block.drivers.qcow2.resize", "vhostblk.block.drivers.qcow2.snapshot_changes"),
    }
)
"""Names of modules."""
# Made before the collector looks for cycles; Python's own number is 700.
_OBJECTS = 50_000


class _LateModule(ModuleType):
    """A module that has not been executed."""

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        # The import system looks there each time the module is imported.
        if name not in ("__spec__", "__class__"):
            loader = get("__spec__").loader
            if isinstance(loader, _LateLoader):
                loader.execute(self)
        return get(name)


class _LateLoader:
    """Executes a module when it is used; see `importlib.abc.Loader`."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader
        self._begun = False
        # Whoever comes while it is executed waits, unless it is the module itself.
        self._lock = RLock()

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """A usual one."""
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """Not yet."""
        module.__class__ = _LateModule

    def execute(self, module: ModuleType) -> None:
        """Now, unless it has been done."""
        with self._lock:
            if self._begun:
                return
            self._begun = True
            self._loader.exec_module(module)
            assert module.__spec__ is not None
            module.__spec__.loader = self._loader
            module.__class__ = ModuleType


class _LateFinder:
    """Finds modules of `LATE`; see `importlib.abc.MetaPathFinder`."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Where they are anyway, with another loader."""
        if name not in LATE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _LateLoader(spec.loader)  # type: ignore[assignment]
        return spec


def main() -> int:
    """Run `vhostblk`; returns its exit code, unless it is an image tool: then it ends the process."""
    if sys.argv[1:2] == ["img"]:
        _img(sys.argv[2:], "vhostblk-img")
    is_tool = sys.argv[1:2] == ["io"]
    if is_tool:
        _import_late()
    from vhostblk.cli.main import main

    status = main()
    return _leave(status) if is_tool else status


def img_main() -> NoReturn:
    """Run `vhostblk-img`, and end the process."""
    _img()


def io_main() -> NoReturn:
    """Run `vhostblk-io`, and end the process."""
    _import_late()
    from vhostblk.cli.io.program import main

    _leave(main())


def _img(argv: Sequence[str] | None = None, program: str | None = None) -> NoReturn:
    _import_late()
    from vhostblk.cli.img.program import main

    _leave(main(argv, program))


def _leave(status: int) -> NoReturn:
    """What had to be closed is: to take all modules and objects apart would be a fifth of a short run."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # it was closed when this began
            with suppress(OSError, ValueError):
                stream.flush()
    os._exit(status)


def _import_late() -> None:
    # Whoever interrupts us before there is anything to be closed does not want to know where we were.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.meta_path.insert(0, _LateFinder)
    # Modules are tens of thousands of objects that stay: there is nothing to be found among them, again and again.
    gc.set_threshold(_OBJECTS, *gc.get_threshold()[1:])
