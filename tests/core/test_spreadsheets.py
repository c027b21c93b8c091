"""Tables for spreadsheets: what strangers named stays a text, and comes back as it was."""

from __future__ import annotations

import csv
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from multiverse_gateway.core.spreadsheets import FORMULA, csv_of, text_of

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)


@pytest.mark.parametrize("begin", FORMULA)
def test_a_formula_is_a_text(begin: str) -> None:
    """Whatever a spreadsheet takes for the beginning of one gets an apostrophe in front, also before a control character."""
    ((cell,),) = csv.reader(io.StringIO(csv_of([[f"{begin}1+1"]]), newline=""))
    assert cell == f"'{begin}1+1"


@pytest.mark.parametrize("text", ["a;=1+1", "a\t=1+1", "a|=1+1", "a\n=1+1", 'a"=1+1', "a,=1+1"])
def test_a_text_stays_in_its_cell(text: str) -> None:
    """Also in a spreadsheet that separates cells by another character: the text is quoted."""
    assert csv_of([[text, 1]]) == '"' + text.replace('"', '""') + '",1\r\n'


@given(st.lists(st.lists(TEXTS | st.integers(0, 2**53) | st.none(), min_size=2, max_size=4), max_size=5))
def test_a_table_comes_back(rows: list[list[str | int | None]]) -> None:
    """A reader of CSV gets every cell, whatever script it is written in."""
    read = list(csv.reader(io.StringIO(csv_of(rows), newline="")))
    expected = [["" if cell is None else cell if isinstance(cell, str) else str(cell) for cell in row] for row in rows]
    assert [[text_of(cell) for cell in row] for row in read] == expected
