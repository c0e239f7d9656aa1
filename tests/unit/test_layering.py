"""The house's rules that a walk through the syntax trees can see: who imports whom, no state in
modules, no file too long.

Checked against the sources, not by importing them, so that an import inside a function counts too.
The checker is itself tested on planted violations.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "vhostblk"

#: Room -> rooms it may import. Arrows may be skipped, never reversed.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "pid_file": {"errors"},
    "native": {"errors"},
    "virtio": {"errors"},
    "vhost": {"native", "virtio", "errors"},
    "block": {"native", "errors"},
    "export": {"block", "vhost", "native", "virtio", "errors"},
    "control": {"export", "block", "vhost", "native", "virtio", "errors"},
    "sandbox": {"block", "errors"},  # what nodes need of the host
    "client": {"vhost", "virtio", "errors"},  # and EXCEPTIONS
}
_BELOW_DAEMON = {"sandbox", "control", "export", "block", "vhost", "native", "virtio", "errors"}
ARROWS["daemon"] = _BELOW_DAEMON | {"pid_file"}
ARROWS["cli"] = _BELOW_DAEMON | {"daemon", "client"}
ARROWS["testing"] = _BELOW_DAEMON | {"daemon", "client", "cli"}
ARROWS["__main__"] = {"cli"}
ARROWS["__init__"] = set()

#: Room -> modules it may import of rooms that it may not import otherwise. A guest in Python measures itself: the
#: loop of the benchmark is C, and nothing else of that room is the client's.
EXCEPTIONS = {"client": {"vhostblk.native.load"}}

#: These, and what they import of their own room, turn bytes or objects into others and do no I/O.
SANS_IO = {
    "vhostblk.vhost.message",
    "vhostblk.vhost.session",
    "vhostblk.vhost.frontend",
    "vhostblk.virtio.blk_request",
    "vhostblk.export.offload",
    "vhostblk.block.drivers.nbd_wire",
    "vhostblk.block.drivers.nbd_handshake",
    "vhostblk.control.schema",
}
IO_MODULES = {"socket", "asyncio", "threading", "os", "time"}

MODULE = re.compile(r"vhostblk(\.\w+)+")

WRITTEN_BY_CFFI = {"_engine.c", "_load.c"}
LONGEST = {".py": 600, ".c": 600, ".h": 600}

MUTABLE_CALLS = {
    *("list", "dict", "set", "bytearray", "deque", "defaultdict", "OrderedDict", "Counter"),
    *("WeakValueDictionary", "WeakKeyDictionary", "WeakSet", "ContextVar", "local", "count"),
    *("ExitStack", "Lock", "Condition", "Event", "Queue", "SimpleQueue"),
}
MUTATING_METHODS = {
    *("append", "extend", "insert", "add", "update", "pop", "popitem", "remove", "discard"),
    *("clear", "setdefault", "sort", "reverse", "appendleft", "popleft"),
}


@dataclass(frozen=True)
class Module:
    """One source file of the package, parsed."""

    name: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The folder or file below the package: vhostblk.block.drivers.raw is in "block"."""
        parts = self.name.split(".")
        return parts[1] if len(parts) > 1 else "__init__"

    @property
    def imports(self) -> list[tuple[int, str]]:
        """Line and full name of everything imported, relative imports resolved."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    parents = self.name.split(".")[: -node.level]
                    base = ".".join([*parents, *([node.module] if node.module else [])])
                found += [(node.lineno, f"{base}.{alias.name}") for alias in node.names]
            elif isinstance(node, ast.Constant) and MODULE.fullmatch(str(node.value)):
                # A name in a table, to be imported when it is needed.
                found.append((node.lineno, str(node.value)))
        return found


def parse(name: str, text: str) -> Module:
    return Module(name, ast.parse(text))


def modules_of_the_package() -> list[Module]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        relative = path.relative_to(PACKAGE.parent).with_suffix("")
        # A package's own name stands for its __init__ where it is imported, but relative imports
        # in it count from one level lower: the package imports absolutely, so nothing depends on it.
        parts = relative.parts[:-1] if relative.name == "__init__" else relative.parts
        found.append(parse(".".join(parts), path.read_text()))
    return found


def type_checking_only(tree: ast.Module) -> set[int]:
    """Lines of imports below ``if TYPE_CHECKING:``, which never run."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            lines |= {inner.lineno for inner in ast.walk(node) if isinstance(inner, ast.stmt)}
    return lines


def arrow_violations(modules: Iterable[Module]) -> Iterator[str]:
    """Imports against the arrows, of rooms that nobody knows, and of cffi outside native."""
    for module in modules:
        if module.room not in ARROWS:
            yield f"{module.name}: {module.room} is not a room of the house"
            continue
        allowed = ARROWS[module.room] | {module.room}
        exceptions = EXCEPTIONS.get(module.room, set())
        for line, name in module.imports:
            parts = name.split(".")
            if parts[0] in ("cffi", "_cffi_backend") and module.room != "native":
                yield f"{module.name}:{line}: cffi is imported by native only"
            if (
                name.startswith(("vhostblk.native._engine", "vhostblk.native._load"))
                and module.room != "native"
            ):
                yield f"{module.name}:{line}: the extension is imported by native only"
            # `from vhostblk import __version__` names no room
            room = parts[1] if parts[0] == "vhostblk" and len(parts) > 1 else ""
            if name in exceptions or name.rpartition(".")[0] in exceptions:
                continue
            if room in ARROWS and room not in allowed:
                yield f"{module.name}:{line}: {module.room} must not import {room}"


def sans_io_violations(modules: Iterable[Module]) -> Iterator[str]:
    """Sans-io modules that import I/O, by themselves or through a module of the package."""
    by_name = {module.name: module for module in modules}
    for start in sorted(SANS_IO & by_name.keys()):
        waiting, seen = [start], {start}
        while waiting:
            module = by_name[waiting.pop()]
            skipped = type_checking_only(module.tree)
            for line, name in module.imports:
                if line in skipped:
                    continue
                if name.split(".")[0] in IO_MODULES:
                    through = "" if module.name == start else f" (through {module.name})"
                    yield f"{start}{through}:{line}: a sans-io module must not import {name}"
                # `from a.b import c`: c is a module or a name in module a.b
                for target in (name, name.rpartition(".")[0]):
                    same_room = target in by_name and by_name[target].room == module.room
                    if same_room and target not in seen:
                        seen.add(target)
                        waiting.append(target)


def is_mutable(value: ast.expr) -> bool:
    if isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp):
        return True
    if isinstance(value, ast.Call):
        return ast.unparse(value.func).split(".")[-1] in MUTABLE_CALLS
    return False


def module_level_names(tree: ast.Module) -> Iterator[tuple[ast.stmt, str, ast.expr]]:
    for node in tree.body:
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield node, target.id, node.value
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node, node.target.id, node.value


def state_violations(modules: Iterable[Module]) -> Iterator[str]:
    """Module-level state: a mutable object that is no constant table, or a table that is changed."""
    for module in modules:
        tables = set()
        for node, name, value in module_level_names(module.tree):
            if not is_mutable(value) or name == "__all__":
                continue
            tables.add(name)
            is_call = isinstance(value, ast.Call)
            empty = isinstance(value, ast.List | ast.Dict) and not ast.unparse(value)[1:-1]
            # An upper-case display that nobody changes is a table.
            if name != name.upper() or is_call or empty:
                yield f"{module.name}:{node.lineno}: {name} is mutable state of the module"
        for inner in ast.walk(module.tree):
            if isinstance(inner, ast.Global):
                yield f"{module.name}:{inner.lineno}: global {', '.join(inner.names)}"
        for function in ast.walk(module.tree):
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                for line, name in mutations(function):
                    if name in tables:
                        yield f"{module.name}:{line}: {name}, of the module, is changed"


def mutations(function: ast.AST) -> Iterator[tuple[int, str]]:
    """Names whose object is changed: ``x[...] = ``, ``del x[...]``, ``x.append(...)``."""
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript):
            changes = isinstance(node.ctx, ast.Store | ast.Del)
        elif isinstance(node, ast.Attribute):
            changes = node.attr in MUTATING_METHODS
        else:
            continue
        if changes and isinstance(node.value, ast.Name):
            yield node.lineno, node.value.id


def test_imports_follow_the_arrows() -> None:
    assert list(arrow_violations(modules_of_the_package())) == []


def test_sans_io_modules_do_no_io() -> None:
    assert list(sans_io_violations(modules_of_the_package())) == []


def test_no_module_has_mutable_state() -> None:
    assert list(state_violations(modules_of_the_package())) == []


def test_no_file_is_too_long() -> None:
    too_long = []
    for path in PACKAGE.rglob("*"):
        if path.suffix in LONGEST and path.name not in WRITTEN_BY_CFFI:
            lines = len(path.read_text().splitlines())
            if lines > LONGEST[path.suffix]:
                too_long.append(f"{path.relative_to(PACKAGE)}: {lines} lines")
    assert too_long == []


def test_every_module_says_what_it_is() -> None:
    silent = [
        module.name for module in modules_of_the_package() if not ast.get_docstring(module.tree)
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("vhostblk.virtio.x", "import vhostblk.block", "virtio must not import block"),
        ("vhostblk.virtio.x", "from vhostblk import vhost", "virtio must not import vhost"),
        ("vhostblk.vhost.x", "from vhostblk.block.node import BlockNode", "must not import block"),
        ("vhostblk.native", "from vhostblk.virtio import chain", "native must not import virtio"),
        ("vhostblk.block.x", "from ..virtio import blk", "block must not import virtio"),
        ("vhostblk.block.drivers.x", "def f():\n import vhostblk.export", "must not import export"),
        ("vhostblk.block.x", "TABLE = {'x': 'vhostblk.export.export'}", "must not import export"),
        ("vhostblk.client.x", "from vhostblk.block import graph", "client must not import block"),
        ("vhostblk.client.x", "from vhostblk.native import disk", "client must not import native"),
        ("vhostblk.client.x", "from vhostblk import native", "client must not import native"),
        ("vhostblk.vhost.x", "import vhostblk.client", "vhost must not import client"),
        ("vhostblk.export.x", "from vhostblk.native._load import lib", "by native only"),
        ("vhostblk.daemon", "from vhostblk.cli import main", "daemon must not import cli"),
        ("vhostblk.export.x", "import vhostblk.testing.guest", "must not import testing"),
        ("vhostblk.errors", "from vhostblk.native import x", "errors must not import native"),
        ("vhostblk.block.x", "import cffi", "cffi is imported by native only"),
        ("vhostblk.export.x", "from cffi import FFI", "cffi is imported by native only"),
        ("vhostblk.export.x", "from vhostblk.native._engine import lib", "by native only"),
        ("vhostblk.export.x", "from vhostblk.native import _engine", "by native only"),
        ("vhostblk.cellar.x", "", "cellar is not a room of the house"),
    ],
)
def test_planted_import_against_the_arrows_is_found(name: str, text: str, complaint: str) -> None:
    (found,) = arrow_violations([parse(name, text)])
    assert complaint in found


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("vhostblk.cli.serve", "from vhostblk.daemon import Daemon\nimport vhostblk.block.graph"),
        ("vhostblk.block.x", "from vhostblk import native\nfrom vhostblk.block.node import N"),
        ("vhostblk.native", "import cffi\nfrom vhostblk.native._engine import ffi"),
        ("vhostblk.client.x", "from vhostblk.vhost import frontend"),
        (
            "vhostblk.client.x",
            "from vhostblk.native.load import Load\nfrom vhostblk.native import load",
        ),
        ("vhostblk.cli.main", "from vhostblk import __version__"),
    ],
)
def test_imports_along_the_arrows_are_allowed(name: str, text: str) -> None:
    assert list(arrow_violations([parse(name, text)])) == []


@pytest.mark.parametrize("io", sorted(IO_MODULES))
def test_planted_io_in_a_sans_io_module_is_found(io: str) -> None:
    direct = parse("vhostblk.vhost.session", f"from {io} import anything")
    assert len(list(sans_io_violations([direct]))) == 1
    modules = [
        parse("vhostblk.vhost.session", "from vhostblk.vhost.payload import Payload"),
        parse("vhostblk.vhost.payload", f"def f():\n    import {io}"),
    ]
    (found,) = sans_io_violations(modules)
    assert "through vhostblk.vhost.payload" in found


def test_io_is_allowed_elsewhere_and_for_the_type_checker() -> None:
    modules = [
        parse("vhostblk.vhost.transport", "import socket, os"),
        parse(
            "vhostblk.vhost.message",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import socket",
        ),
    ]
    assert list(sans_io_violations(modules)) == []


@pytest.mark.parametrize(
    "text",
    [
        "sessions = []",
        "_sessions: dict[int, str] = {}",
        "CACHE = {}",
        "_CACHE: dict[int, int] = dict()",
        "import itertools\nNUMBERS = itertools.count()",
        "TABLE = {1: 2}\ndef f():\n    TABLE[3] = 4",
        "TABLE = [1]\ndef f():\n    TABLE.append(3)",
        "TABLE = [1]\nclass C:\n    async def f(self):\n        del TABLE[0]",
        "current = None\ndef f():\n    global current\n    current = 1",
    ],
)
def test_planted_module_state_is_found(text: str) -> None:
    assert len(list(state_violations([parse("vhostblk.x", text)]))) >= 1


@pytest.mark.parametrize(
    "text",
    [
        "__all__ = ['a']",
        "TABLE = {1: 2}\ndef f():\n    return TABLE[1]",
        "_NAMES = [name for name in 'abc']",
        "from types import MappingProxyType\ntable = MappingProxyType({1: 2})",
        "def f():\n    found = []\n    found.append(1)\n    return found",
        "LIMIT = 3",
    ],
)
def test_constant_tables_are_no_state(text: str) -> None:
    assert list(state_violations([parse("vhostblk.x", text)])) == []
