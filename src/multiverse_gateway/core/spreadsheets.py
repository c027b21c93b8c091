"""Texts in the cells of CSV files: spreadsheets would take some of them for formulas, so these get an apostrophe in front."""

FORMULA = ("=", "+", "-", "@", "\t", "\r", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Spreadsheets take a text that begins with one of these for a formula; the last four are the wide forms of the first four."""


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
