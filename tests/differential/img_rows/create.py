"""Rows of `create`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS = (
    *rows("""
        create
    """),
    Row("create", process=True),
)
