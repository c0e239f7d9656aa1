"""The binding of the load generator and its header say the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from enum import IntEnum

import pytest

from vhostblk.errors import StateError
from vhostblk.native import load

pytestmark = pytest.mark.skipif(not load.available(), reason="the generator is not built")


@pytest.mark.parametrize(
    ("c_enum", "prefix", "enum"),
    [
        ("enum vb_load_op", "VB_LOAD_", load.LoadOp),
        ("enum vb_load_phase", "VB_LOAD_", load.LoadPhase),
        ("enum vb_load_failure", "VB_LOAD_", load.LoadFailure),
    ],
)
def test_enum_is_that_of_the_header(c_enum: str, prefix: str, enum: type[IntEnum]) -> None:
    numbers = dict(load._extension().ffi.typeof(c_enum).relements)
    for end in ("OPS", "PHASES"):
        numbers.pop(prefix + end, None)
    assert numbers == {prefix + member.name: member.value for member in enum}


def test_histogram_is_as_long_as_the_header_says() -> None:
    assert load._extension().lib.VB_LOAD_BUCKETS == load.BUCKETS


@pytest.mark.parametrize(
    ("struct", "fields", "besides"),
    [
        (
            "struct vb_load_options",
            [f.name for f in dataclasses.fields(load.LoadOptions)],
            {"model"},
        ),
        ("struct vb_load_ring", load.LoadRing._fields, set()),
        ("struct vb_load_stats", [f.name for f in dataclasses.fields(load.LoadStats)], set()),
        ("struct vb_load_op_stats", [f.name for f in dataclasses.fields(load.OpStats)], set()),
        ("struct vb_load_error", [f.name for f in dataclasses.fields(load.LoadError)], set()),
    ],
)
def test_struct_has_the_fields_of_the_header(
    struct: str, fields: list[str], besides: set[str]
) -> None:
    assert {name for name, _ in load._extension().ffi.typeof(struct).fields} == set(
        fields
    ) | besides


def test_every_counter_is_summed_over_the_threads() -> None:
    counters = {f.name for f in dataclasses.fields(load.LoadStats)} - {"op", "begin", "end"}
    assert set(load._SUMMED) == counters


def test_clock_is_what_it_is_calibrated_to() -> None:
    frequency = load.calibrate()
    assert frequency == pytest.approx(load.calibrate(), rel=0.05)
    assert load.clock_cost() < frequency / 1e6
    if not load.clock_is_tsc():
        assert frequency == 1e9


def test_rings_that_do_not_fit_are_refused() -> None:
    options = load.LoadOptions(0, 4096, 4096, 4096, (1, 0, 0, 0, 0))
    with pytest.raises(OSError, match="load generator: Invalid argument"):
        load.Load(options, [load.LoadRing(0, 0, 0, 16, 0, 0, 0, 0)])


def test_missing_extension_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vhostblk.native._load", None)
    load._extension.cache_clear()
    assert not load.available()
    with pytest.raises(StateError, match="the load generator was not built: "):
        load.ticks()
    monkeypatch.undo()
    assert load.available()


def test_commands_that_do_not_need_it_do_not_load_it() -> None:
    script = (
        "import sys; from vhostblk.cli.main import build_parser; "
        "build_parser(); print('vhostblk.native._load' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=20, check=True
    )
    assert done.stdout == "False\n"
