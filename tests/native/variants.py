"""C tests, compiled in several ways when they are first asked for."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from tests.requirements import require

__all__ = ["ASAN", "TSAN", "Variants"]

Variant = tuple[str, Sequence[str]]
"""A compiler and its flags."""

ASAN: Variant = ("gcc", ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"))
# gcc's ThreadSanitizer does not know fences, clang's does.
TSAN: Variant = ("clang", ("-fsanitize=thread",))


class Variants:
    """What a build script makes.

    Args:
        script: is given the path of its output, and flags; CC says which compiler.
        folder: for the output.
    """

    def __init__(self, script: Path, folder: Path, variants: dict[str, Variant]) -> None:
        self._script = script
        self._folder = folder
        self._variants = variants
        self._complaints: dict[str, str] = {}

    def __getitem__(self, name: str) -> Path:
        compiler, flags = self._variants[name]
        require(compiler, group="compiler")
        output = self._folder / name
        if name not in self._complaints:  # also if it failed: hundreds of tests would try again
            done = subprocess.run(
                [self._script, output, "-Werror", *flags],
                env={**os.environ, "CC": compiler},
                stderr=subprocess.PIPE,
                text=True,
                timeout=100,
                check=False,
            )
            self._complaints[name] = done.stderr if done.returncode else ""
        assert not self._complaints[name], self._complaints[name]
        return output
