"""What is known of the tests: results that are kept, and the failures that docs/iotests.md explains."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

from tests.iotests.running import PASSED, Result
from tests.iotests.suite import BUILD, ROOT

DOCUMENT = ROOT / "docs" / "iotests.md"


class Kept:
    """Results of one side and format, in a file below build/iotests; those of another version are forgotten."""

    def __init__(self, side: str, image_format: str, version: str) -> None:
        self._path: Path = BUILD / f"{side}-{image_format}.json"
        self._version = version
        self.results = self._read()

    def _read(self) -> dict[str, Result]:
        if not self._path.exists():
            return {}
        kept = json.loads(self._path.read_text())
        if kept["version"] != self._version:
            return {}
        return {test: Result(**fields) for test, fields in kept["tests"].items()}

    def put(self, test: str, result: Result) -> None:
        """Keep it, and what other runs have kept meanwhile."""
        self.results[test] = result
        tests = {name: asdict(one) for name, one in sorted((self._read() | {test: result}).items())}
        text = json.dumps({"version": self._version, "tests": tests}, indent=1)
        new = self._path.with_suffix(f".{os.getpid()}")
        new.write_text(text)
        new.replace(self._path)


def known_failures(text: str) -> dict[tuple[str, str], str]:
    """Why tests fail, by format and test: the rows `| formats | tests | reason |` of the document."""
    reasons = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        formats = cells[0].split(", ")
        if line.startswith("|") and len(cells) == 3 and {*formats} <= {"raw", "qcow2"}:
            for image_format in formats:
                for test in cells[1].split(", "):
                    reasons[image_format, test.strip("`")] = cells[2]
    return reasons


def is_eligible(stock: Result) -> bool:
    """Whether a test counts: QEMU's own tools pass it without an emulator."""
    return stock.status == PASSED
