"""Tables as text, Markdown and CSV; parts of documents; the document that they are for."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from tests.bench.measure import Metrics
from tests.bench.scaling import SECTIONS
from tests.bench.tables import Table, as_csv, markdown, number, ratio, replace_part, text

DOCUMENT = Path(__file__).parents[2] / "docs" / "benchmarks.md"


def test_markdown_has_titles_and_cells_that_do_not_break_it() -> None:
    table = Table("n", "t", [["", "IOPS"], ["a|b", "1"]], ["a note"])
    assert markdown(table) == "|  | IOPS |\n| --- | ---: |\n| a\\|b | 1 |\n\na note\n"


def test_stars_are_explained_only_where_there_are_any() -> None:
    assert "other programs" not in text(Table("n", "t", [["", "ratio"], ["x", "1.00"]]))
    starred = Table("n", "t", [["", "ratio"], ["x", "1.00*"]])
    assert text(starred).splitlines()[-1].startswith("* other programs")
    assert "\n\\* other programs" in markdown(starred)


def test_ratio_needs_something_to_divide_by() -> None:
    assert ratio(1.0, 2.0) == "0.50"
    assert ratio(1.0, 2.0, star=True) == "0.50*"
    assert ratio(1.0, 0.0) == ratio(None, 1.0) == ratio(1.0, None) == ""


def test_number_that_is_not_known() -> None:
    assert number(None) == "n/a"
    assert number(1234567) == "1.235M"


def test_csv_has_medians_of_all_metrics_and_gaps_where_there_are_none() -> None:
    results: dict[str, dict[str, list[Metrics]]] = {
        "row": {
            "ours": [{"iops": 1.0, "p50_us": None}, {"iops": 3.0, "p50_us": None}],
            "fio": [{"iops": 5.0, "bw": 7.0}],
        }
    }
    ours, fio = csv.DictReader(as_csv(results).splitlines())
    assert ours == {
        "row": "row",
        "program": "ours",
        "runs": "2",
        "iops": "2.0",
        "p50_us": "",
        "bw": "",
    }
    assert (fio["iops"], fio["bw"], fio["runs"]) == ("5.0", "7.0", "1")


def test_only_the_part_with_that_name_is_replaced() -> None:
    document = "a\n<!-- measured: x -->\nold\n<!-- end -->\nb\n<!-- measured: y -->\n<!-- end -->\n"
    found = replace_part(document, "x", "new \\1\n")
    assert found == document.replace("old\n", "new \\1\n\n")
    assert replace_part(found, "x", "new \\1\n") == found
    with pytest.raises(KeyError):
        replace_part(document, "z", "new")


def test_document_has_a_part_for_every_table() -> None:
    names = re.findall(r"<!-- measured: (\S+) -->", DOCUMENT.read_text())
    assert sorted(names) == sorted(["targets", *SECTIONS, "profile", "python", "qcow2"])
