"""Tables as CSV for spreadsheets: texts of strangers stay texts, whatever they contain and whatever separates the cells there."""

import re
from collections.abc import Iterable, Sequence

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Spreadsheets take a text that begins with one of these for a formula; the last four are the wide forms of the first four."""
_QUOTED = re.compile(r'[",;|\t\r\n]')
"""What would end a cell here, or in a spreadsheet of another language."""

Cell = str | int | None


def safe_cell(text: str) -> str:
    """Return a text as a cell that spreadsheets take for text; `text_of` reads it.

    >>> safe_cell("=1+1"), safe_cell("O'Brien"), safe_cell("'quoted'")
    ("'=1+1", "O'Brien", "''quoted'")
    """
    return f"'{text}" if text.startswith((*FORMULA, "'")) else text


def text_of(cell: str) -> str:
    """Return the text that `safe_cell` made a cell of.

    >>> text_of("'=1+1"), text_of("O'Brien"), text_of("''quoted'")
    ('=1+1', "O'Brien", "'quoted'")
    """
    return cell.removeprefix("'")


def csv_of(rows: Iterable[Sequence[Cell]]) -> str:
    r"""Return rows as CSV (RFC 4180) in which every text is a `safe_cell`.

    >>> csv_of([["name", "requests"], ["=1+1", 2], ["a;=1+1", None]])
    'name,requests\r\n\'=1+1,2\r\n"a;=1+1",\r\n'
    """
    return "".join(f"{','.join(map(_written, row))}\r\n" for row in rows)


def _written(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, int):
        return str(cell)
    text = safe_cell(cell)
    return '"' + text.replace('"', '""') + '"' if _QUOTED.search(text) else text
