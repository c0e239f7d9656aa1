"""Tables and JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, fields, replace

import pytest

from tests.unit.client.bench.results import result
from vhostblk import __version__
from vhostblk.client.bench.compare import METRICS, Comparison
from vhostblk.client.bench.options import BenchOptions
from vhostblk.client.bench.report import (
    bandwidth,
    comparison_json,
    comparison_table,
    format_table,
    rate,
    result_json,
    table_of,
)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1234, "1.234k"), (999_999, "1000k"), (4_512_345, "4.512M")],
)
def test_rates_have_four_digits(value: float, text: str) -> None:
    assert rate(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(512, "512 B/s"), (4 << 20, "4 MiB/s"), (3 << 29, "1.5 GiB/s")]
)
def test_bandwidth_is_in_powers_of_1024(value: float, text: str) -> None:
    assert bandwidth(value) == text


def test_columns_are_aligned() -> None:
    assert format_table([["a", "bb"], ["ccc", "d"]]) == "a    bb\nccc   d"


def test_table_shows_latency_and_the_cost_on_both_sides() -> None:
    text = table_of(result(1000, us=10))
    titles, row, _, costs = text.splitlines()
    assert titles.split()[-6:] == ["p50", "p90", "p99", "p99.9", "p99.99", "max"]
    assert row.split()[-6:] == ["10", "20", "30", "40", "50", "100"]
    assert "back-end 0.5 us of CPU (50 % of a CPU)" in costs
    assert "0.5 kicks, 0 calls" in costs


def test_table_says_that_a_process_could_not_be_seen() -> None:
    assert "back-end n/a us of CPU, client" in table_of(result(cpu=None))


@pytest.mark.parametrize(
    ("compared", "blocks", "said"),
    [
        (4096, 0, "verified: 4096 bytes of reads were right"),
        (0, 7, "verified: 7 blocks were read again afterwards, and were right"),
        (512, 1, "verified: 512 bytes of reads were right; 1 blocks were read again"),
    ],
)
def test_table_says_what_was_verified(compared: int, blocks: int, said: str) -> None:
    last = table_of(replace(result(), compared=compared, verified_blocks=blocks)).splitlines()[-1]
    assert last.startswith(said)


def test_comparison_shows_every_run_medians_and_ratios() -> None:
    ours = [result(iops, socket="ours", us=5) for iops in (100, 300, 200)]
    theirs = [result(iops, socket="theirs", us=20) for iops in (100, 100, 100)]
    lines = comparison_table(Comparison(ours, theirs)).splitlines()
    assert lines[:2] == ["A = ours", "B = theirs"]
    assert [line.split()[:2] for line in lines[4:10]] == [
        [str(n), letter] for n in (1, 2, 3) for letter in "AB"
    ]
    ratios = lines[-1].split()
    assert ratios[:5] == ["A", "/", "B", "2.00", "0.25"]


def test_json_has_the_version_every_option_and_every_number() -> None:
    options = BenchOptions(depth=7)
    read = json.loads(result_json(options, result()))
    assert read["version"] == __version__
    assert read["options"].keys() == {field.name for field in fields(BenchOptions)}
    assert read["options"]["depth"] == 7
    assert read["result"] == json.loads(json.dumps(asdict(result())))


def test_json_of_a_comparison_has_runs_medians_and_ratios() -> None:
    read = json.loads(
        comparison_json(BenchOptions(), Comparison([result(200)] * 3, [result(100)] * 3))
    )
    assert len(read["first"]["runs"]) == len(read["second"]["runs"]) == 3
    assert tuple(read["ratios"]) == tuple(read["first"]["medians"]) == METRICS
    assert read["ratios"]["iops"] == 2
