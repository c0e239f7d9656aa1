"""Build the engine and the load generator: `setup.py` names their builders, cffi runs this file for each.

`engine.h` and `load.h` are C headers and cffi declarations in one, so the two cannot disagree. They
are two extensions, because a daemon has no use for a load generator. The engine is compiled without
liburing where it is missing (it then does its I/O with a pool of threads), and neither where there is
no C compiler: the extensions are optional, `vhostblk.native` says so, and exports use the data path
written in Python.

Environment:
    VHOSTBLK_WERROR=1: warnings are errors. For us, never for the compilers of users.
    VHOSTBLK_NO_URING=1: build as if liburing were missing.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence

# Python has none since 3.12: what setuptools, which runs this, provides under that name.
from distutils.ccompiler import new_compiler
from distutils.errors import CompileError, LinkError
from distutils.sysconfig import customize_compiler
from pathlib import Path

import cffi

# cffi executes this file from the directory of setup.py; absolute paths may not go into an sdist.
HERE = Path("vhostblk/native")

CFLAGS = ["-std=gnu11", "-O2", "-Wall", "-Wextra", "-fvisibility=hidden", "-pthread"]

URING_PROBE = """
#include <liburing.h>
int main(void)
{
	struct io_uring ring;
	return io_uring_queue_init(1, &ring, 0) || io_uring_register_buffers_sparse(&ring, 1);
}
"""


def compiles(source: str, libraries: Sequence[str] = ()) -> bool:
    """Try to compile and link a program."""
    compiler = new_compiler()
    customize_compiler(compiler)
    with tempfile.TemporaryDirectory() as folder, _silence():
        path = Path(folder, "probe.c")
        path.write_text(source)
        try:
            objects = compiler.compile([str(path)], output_dir=folder)
            compiler.link_executable(objects, "probe", output_dir=folder, libraries=list(libraries))
        except (CompileError, LinkError, OSError):
            return False
    return True


def has_liburing() -> bool:
    """Whether there is liburing, with the newest function the engine needs (2.2)."""
    return os.environ.get("VHOSTBLK_NO_URING") != "1" and compiles(URING_PROBE, ["uring"])


def tell(what: str) -> None:
    """Say it once: this file is executed for each of the steps that an installation has."""
    if {"bdist_wheel", "editable_wheel", "build_ext"} & set(sys.argv):
        print(f"vhostblk: {what}", file=sys.stderr)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep what the compiler says about the probe from the user, who cannot do anything with it."""
    saved = os.dup(2)
    try:
        with open(os.devnull, "w") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def declarations(header: Path) -> str:
    """Give the header as cffi reads it: without includes and pragmas."""
    lines = header.read_text().splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#include", "#pragma")))


def warnings() -> list[str]:
    """CFLAGS, and whether what they find ends the build."""
    return [*CFLAGS, *(["-Werror"] if os.environ.get("VHOSTBLK_WERROR") == "1" else [])]


def make_engine() -> cffi.FFI:
    """Describe the engine."""
    macros = [("_GNU_SOURCE", "1")]
    libraries = []
    if has_liburing():
        libraries.append("uring")
    else:
        macros.append(("VB_NO_URING", "1"))
        if compiles("int main(void) { return 0; }"):
            tell("liburing >= 2.2 not found: the engine is built without io_uring")
        else:
            tell("no C compiler found: there will be no engine, Python moves the data")
    builder = cffi.FFI()
    builder.cdef(declarations(HERE / "engine.h"))
    builder.set_source(
        "vhostblk.native._engine",
        '#include "engine.h"',
        sources=sorted(map(str, HERE.glob("src/*.c"))),
        depends=[str(HERE / "engine.h"), *sorted(map(str, HERE.glob("src/*.h")))],
        include_dirs=[str(HERE)],
        libraries=libraries,
        define_macros=macros,
        extra_compile_args=warnings(),
        extra_link_args=["-pthread"],
        optional=True,
    )
    return builder


def make_load() -> cffi.FFI:
    """Describe the load generator."""
    builder = cffi.FFI()
    builder.cdef(declarations(HERE / "load.h"))
    builder.set_source(
        "vhostblk.native._load",
        '#include "load.h"',
        sources=sorted(map(str, HERE.glob("load_src/*.c"))),
        depends=[
            str(HERE / "load.h"),
            str(HERE / "src/common.h"),
            *sorted(map(str, HERE.glob("load_src/*.h"))),
        ],
        include_dirs=[str(HERE)],
        define_macros=[("_GNU_SOURCE", "1")],
        extra_compile_args=warnings(),
        extra_link_args=["-pthread"],
        optional=True,
    )
    return builder


# Functions, so that each run of this file describes only what it builds.
ffibuilder = make_engine
loadbuilder = make_load
