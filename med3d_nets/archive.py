"""An archive of scans: which of its cases are finished already, and one table of all at the end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from med3d_nets.files import replacing
from med3d_nets.tables import csv_text

DONE, SKIPPED, FAILED = "done", "skipped", "failed"
_IN_TWO_FILES = (".mhd", ".nhdr")  # a header with the voxels in another file of the same stem


def origin_of(image: str | Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a result depends on, as it is found again in JSON: equal origins have equal results.

    Args:
        image: the volume's file or DICOM folder.
        settings: everything else, for example the hash of the weights.

    Returns:
        ``image``, ``image_bytes`` and ``image_modified`` (of a folder: of its files together, and the latest), and
        the settings.
    """
    try:
        stats = [path.stat() for path in _files(Path(image))]
    except OSError:  # reading the image will tell
        stats = []
    latest = max((stat.st_mtime for stat in stats), default=0.0)
    return json.loads(
        json.dumps(
            {
                "image": str(image),
                "image_bytes": sum(stat.st_size for stat in stats),
                "image_modified": datetime.fromtimestamp(latest, timezone.utc).isoformat(timespec="microseconds"),
                **settings,
            }
        )
    )


def is_finished(report: Mapping[str, Any] | None, origin: Mapping[str, Any], folder: Path) -> bool:
    """Whether a result is whole and what would be made now.

    Args:
        report: of the result, as ``read_report`` gives it.
        origin: of what would be made now.
        folder: of the files that the report names with their sizes in bytes in ``files``.
    """
    if report is None or any(report.get(key) != value for key, value in origin.items()):
        return False
    paths = {folder / name: size for name, size in report["files"].items()}
    return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())


def read_report(path: Path) -> dict[str, Any] | None:
    """Read a report; None where there is none that can be read."""
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return report if isinstance(report, dict) and isinstance(report.get("files"), dict) else None


def status(case: str, failed: Iterable[str], skipped: Iterable[str]) -> str:
    """What became of a case."""
    return FAILED if case in failed else SKIPPED if case in skipped else DONE


def summary_row(case: Mapping[str, Any], state: Any, report: Mapping[str, Any] | None) -> dict[str, Any]:
    """One row of ``summary.csv``.

    Args:
        case: ``case`` and ``image``.
        state: of the CaseEvaluator, after its last case.
        report: of the case's result, None where it has none.
    """
    name = str(case["case"])
    row = {
        "case": name,
        "image": str(case["image"]),
        "status": status(name, state.failed, state.skipped),
        "reason": state.failed.get(name, ""),
    }
    if report is None:
        return row
    volumes = {volume_column(label): one["volume_ml"] for label, one in report["labels"].items()}
    return {
        **row,
        **volumes,
        "total_ml": report["total_volume_ml"],
        "warnings": "; ".join(report["warnings"]),
        "seconds": report["seconds"],
        "mask": report["mask"],
    }


def write_summary(path: Path, rows: Sequence[Mapping[str, Any]], labels: Sequence[str]) -> None:
    """Write the table of all cases.

    Args:
        path: the CSV file.
        rows: as ``summary_row`` makes them.
        labels: names of the labels.

    Raises:
        InputError: the file cannot be written.
    """
    columns = [
        "case",
        "image",
        "status",
        "reason",
        *map(volume_column, labels),
        "total_ml",
        "warnings",
        "seconds",
        "mask",
    ]
    with replacing(path) as hidden:
        hidden.write_text(csv_text(columns, rows), encoding="utf-8")
    counts = ", ".join(f"{sum(row['status'] == one for row in rows)} {one}" for one in (DONE, SKIPPED, FAILED))
    print(f"{len(rows)} cases ({counts}) -> {path}", flush=True)


def volume_column(label: str) -> str:
    """Name of the column of a label's volume."""
    return f"{label.replace(' ', '_')}_ml"


def _files(image: Path) -> list[Path]:
    if image.is_dir():
        return [path for path in image.iterdir() if path.is_file()]
    if image.suffix.lower() in _IN_TWO_FILES:
        return [path for path in image.parent.iterdir() if path.is_file() and path.name.startswith(f"{image.stem}.")]
    return [image]
