"""Tables of text, for people."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], columns: str) -> str:
    """The rows in columns as wide as they need to be, with a rule below the first row.

    columns: a letter for each column, l (left) or r (right).
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    rule = ["-" * width for width in widths]
    align = {"l": str.ljust, "r": str.rjust}
    return "\n".join(
        "  ".join(align[side](cell, width) for side, cell, width in zip(columns, row, widths, strict=True)).rstrip()
        for row in (rows[0], rule, *rows[1:])
    )


def markdown(rows: Sequence[Sequence[str]], columns: str) -> str:
    """The same rows as a table in Markdown; columns as in `table`."""
    rule = [{"l": "---", "r": "---:"}[side] for side in columns]
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))
