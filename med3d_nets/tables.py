"""Tables as CSV: those of a user are read, ours are written."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from med3d_nets.errors import InputError

Row = dict[str, str]


def read_rows(path: Path, needed: Sequence[str]) -> list[Row]:
    """Read a CSV table (UTF-8) with a header.

    Args:
        path: the table.
        needed: columns that it must have, with a value in every row.

    Returns:
        Cells by column, without spaces at their ends, one mapping per row.

    Raises:
        InputError: the table cannot be read, has no row, lacks a column, has one twice, or lacks a value.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file. Give a CSV table with the columns {' and '.join(needed)}.")
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            table = csv.DictReader(stream)
            columns = [str(name).strip() for name in table.fieldnames or ()]
            lines = [[str(value or "").strip() for value in list(row.values())[: len(columns)]] for row in table]
    except (OSError, csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is no CSV table in UTF-8 ({error}). Save it as such.") from error
    missing = [name for name in needed if name not in columns]
    if len(set(columns)) < len(columns):
        raise InputError(f"{path}: a column comes twice among {', '.join(columns)}. Remove one.")
    if missing:
        raise InputError(
            f"{path}: has no column {' and no column '.join(missing)}. Its columns: {', '.join(columns) or 'none'}. "
            f"Needed: {' and '.join(needed)}, in the first line, separated by commas."
        )
    if not lines:
        raise InputError(f"{path}: has no row below its header. Add one per volume: {','.join(needed)}.")
    rows = [dict(zip(columns, line, strict=True)) for line in lines]
    for number, row in enumerate(rows, start=2):
        for name in needed:
            if not row[name]:
                raise InputError(f"{path}, line {number}: no {name} in this row ({','.join(row.values())}).")
    return rows


def csv_text(columns: Sequence[str], rows: Iterable[Sequence[Any] | Mapping[str, Any]]) -> str:
    """Make the text of a CSV table.

    Args:
        columns: its header.
        rows: cells in the order of the columns, or by column; what is missing there is left empty.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([row.get(name, "") for name in columns] if isinstance(row, Mapping) else row for row in rows)
    return text.getvalue()
