"""Points in scans that a user names, in world millimetres, in the columns of LUNA16's ``annotations.csv``.

LUNA16's coordinates are those of ITK and DICOM, LPS: x grows to the patient's left, y to the back, z to the head. Here
and in MONAI positions are RAS: x to the right, y to the front, z to the head.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from med3d_nets import dicom
from med3d_nets.errors import InputError
from med3d_nets.inputs import VOLUME_SUFFIXES, find_cases
from med3d_nets.tables import read_rows

SPACES = ("LPS", "RAS")
COLUMNS = ("coordX", "coordY", "coordZ")
_UNSAFE = re.compile(r"[^\w.-]+")


@dataclass(frozen=True)
class SeedPoint:
    """One row of a table of points.

    Attributes:
        row: line of the file, the header is line 1.
        series: ``seriesuid``, or ``path`` where the table has that column.
        position: x, y, z in mm, RAS.
        diameter: ``diameter_mm``, None without that column.
        name: ``case`` where the table has that column, else ``SERIES_ROW``; names the point's results.
    """

    row: int
    series: str
    position: tuple[float, float, float]
    diameter: float | None
    name: str


def read_points(path: str | Path, space: str = "LPS") -> list[SeedPoint]:
    """Read a table of points.

    Args:
        path: CSV file (UTF-8) with the columns ``coordX``, ``coordY``, ``coordZ`` (mm) and ``seriesuid`` or ``path``;
            optionally ``diameter_mm`` (mm) and ``case``, a unique name. Other columns are ignored.
        space: ``LPS``, as LUNA16, ITK and DICOM write coordinates, or ``RAS``, as NIfTI and 3D Slicer do.

    Returns:
        The points in the table's order.

    Raises:
        InputError: the table cannot be read, is empty or lacks a column; a coordinate is no number; a diameter is not
            above zero; a name comes twice; or the space is neither of the two.
    """
    if space not in SPACES:
        raise InputError(f"space={space!r}: allowed are {' and '.join(SPACES)}.")
    path = Path(path).expanduser()
    rows = read_rows(path, COLUMNS)
    key = next((name for name in ("path", "seriesuid") if name in rows[0]), "")
    if not key:
        raise InputError(f"{path}: has neither a column seriesuid nor a column path, so no point has a scan. Add one.")
    sign = -1.0 if space == "LPS" else 1.0
    points = []
    for line, row in enumerate(rows, start=2):
        where = f"{path}, line {line}"
        if not row[key]:
            raise InputError(f"{where}: no {key} in this row ({','.join(row.values())}).")
        x, y, z = (_number(where, row, name) for name in COLUMNS)
        diameter = _number(where, row, "diameter_mm") if row.get("diameter_mm") else None
        if diameter is not None and diameter <= 0:
            raise InputError(f"{where}: diameter_mm is {diameter:g}; a nodule's is above 0 mm.")
        stem = Path(row[key]).name if key == "path" else row[key]
        name = row.get("case") or _UNSAFE.sub("_", f"{stem}_{line}")
        points.append(SeedPoint(line, row[key], (sign * x, sign * y, z), diameter, name))
    twice = [name for name, count in Counter(point.name.lower() for point in points).items() if count > 1]
    if twice:
        raise InputError(f"{path}: the name {', '.join(twice[:5])} comes twice. Results are named so; keep one row.")
    return points


def cases_at_points(
    points: Sequence[SeedPoint], dataset_dir: str | Path, table: str | Path = ""
) -> list[dict[str, Any]]:
    """Find the scan of each point.

    Args:
        points: of ``read_points``.
        dataset_dir: scans, see ``find_cases``, also in direct sub-folders as LUNA16's ``subset0`` … ``subset9``. A
            ``seriesuid`` is a scan's name (file name without suffix, or folder) or the SeriesInstanceUID of a DICOM
            series; a ``path`` is relative to this folder or absolute.
        table: the points' file, for messages.

    Returns:
        ``image`` (path), ``case`` (the point's name), ``series``, ``point`` (mm, RAS), ``where`` (file and line), in
        the order of the scans, so that one scan is read once for all its points.

    Raises:
        InputError: a point's scan is not there; says which row.
    """
    by_path = {point.series for point in points if _is_path(point.series)}
    known = _series_in(Path(dataset_dir).expanduser()) if any(p.series not in by_path for p in points) else {}
    cases = []
    for point in points:
        where = f"{table}, line {point.row}"
        own = Path(dataset_dir).expanduser() / point.series
        image = str(own.resolve()) if point.series in by_path and own.exists() else known.get(point.series, "")
        if not image:
            some = f" Its scans: {', '.join(list(known)[:5])} …" if known else ""
            raise InputError(f"{where}: there is no scan '{point.series}' in {dataset_dir}.{some}")
        case = {"image": image, "case": point.name, "series": point.series, "point": point.position, "where": where}
        cases.append(case)
    return sorted(cases, key=lambda case: str(case["image"]))


def _number(where: str, row: dict[str, str], name: str) -> float:
    try:
        value = float(row[name])
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"{where}: {name} is {row[name]!r}; needed is a number of millimetres.")
    return value


def _is_path(series: str) -> bool:
    return "/" in series or series.lower().endswith(VOLUME_SUFFIXES)


def _series_in(folder: Path) -> dict[str, str]:
    """Path of each scan in a folder and in its sub-folders, by name and, of DICOM, by SeriesInstanceUID."""
    cases = []
    subsets = [one for one in sorted(folder.glob("subset*")) if one.is_dir()] if folder.is_dir() else []
    for place in subsets or [folder]:
        cases += find_cases(place)
    known = {case["case"]: case["image"] for case in cases}
    for case in cases:
        path = Path(case["image"])
        if path.is_dir():
            known.setdefault(dicom.series_uid(path), case["image"])
    return known
