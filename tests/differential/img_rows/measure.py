"""Rows of `measure`."""

from __future__ import annotations

from tests.differential.img_matrix import Row, rows

ROWS: tuple[Row, ...] = (*rows(""),)
