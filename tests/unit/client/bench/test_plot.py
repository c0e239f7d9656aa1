"""Drawings, and what is said where they cannot be made."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from tests.unit.client.bench.results import result
from vhostblk.client.bench.plot import check_plot, plot
from vhostblk.errors import ConfigError

needs_matplotlib = pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is None, reason="needs the extra 'plot'"
)


def test_missing_matplotlib_is_told_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'vhostblk\[plot\]'"):
        check_plot("x.svg")


@needs_matplotlib
@pytest.mark.leaks("matplotlib keeps fonts open, and a thread while it looks for them")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("path", "message"), [("x.doc", "must end in one of"), ("missing/x.svg", "no such folder")]
)
def test_drawing_that_cannot_be_written_is_refused_before_the_run(path: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_plot(path)


@needs_matplotlib
@pytest.mark.leaks("matplotlib keeps fonts open, and a thread while it looks for them")
@pytest.mark.filterwarnings("default")
def test_drawing_names_both_sides(tmp_path: Path) -> None:
    import matplotlib

    path = tmp_path / "x.svg"
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        plot(str(path), "title", {"ours": [result(), result()], "theirs": [result(us=20)]})
    text = path.read_text()
    for word in ("title", "ours", "theirs", "latency", "IOPS", "99.9 %"):
        assert word in text
