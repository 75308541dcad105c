"""Scans with annotated nodules in the form of LUNA16: volumes named after their series, and annotations.csv.

Setio et al., Validation, comparison, and combination of algorithms for automatic detection of pulmonary nodules in CT
(Medical Image Analysis 2017). Its folder has ``subset0`` to ``subset9`` with ``SERIESUID.mhd`` and ``.raw``.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.config import KeysCollection
from monai.transforms import MapTransform

from med3d_nets import dicom
from med3d_nets.datalist import Case, split_by_patient
from med3d_nets.errors import InputError
from med3d_nets.inputs import find_cases
from med3d_nets.seed_points import SeedPoint, read_points
from med3d_nets.tables import read_rows

ANNOTATIONS, EXCLUDED, PATIENTS = "annotations.csv", "annotations_excluded.csv", "patients.csv"


def read_luna(
    dataset_dir: str | Path, annotations: str | Path = "", excluded: str | Path = "", space: str = "LPS"
) -> list[Case]:
    """List the scans of a folder with their nodules; scans without a row have none.

    Args:
        dataset_dir: scans, see ``find_cases``, or folders ``subset*`` of them. Files are named after their series; of
            DICOM folders the SeriesInstanceUID counts too. With ``patients.csv`` (seriesuid, patient) in it, a split
            keeps patients together; without, every scan is a patient.
        annotations: table of the nodules, see ``read_points``, with ``diameter_mm``; empty: ``annotations.csv`` in the
            folder.
        excluded: table of findings that are neither nodules nor background; empty: ``annotations_excluded.csv`` in
            the folder, where there is one. Rows without a positive diameter count as 10 mm, as in LUNA16.
        space: ``LPS``, as LUNA16 has it, or ``RAS``.

    Returns:
        ``image``, ``case``, ``patient``, ``points`` and ``excluded`` (each a list of x, y, z, diameter, RAS mm) and
        ``rows`` (file and line of each point, for messages).

    Raises:
        InputError: no scans; a table that cannot be read or lacks a column; a nodule without diameter; or a table none
            of whose series is among the scans.
    """
    folder = Path(dataset_dir).expanduser()
    subsets = sorted(one for one in folder.glob("subset*") if one.is_dir()) if folder.is_dir() else []
    scans: list[dict[str, str]] = [case for place in subsets or [folder] for case in find_cases(place)]
    table = Path(annotations).expanduser() if str(annotations) else folder / ANNOTATIONS
    points = read_points(table, space)
    bare = next((point for point in points if point.diameter is None), None)
    if bare is not None:
        raise InputError(f"{table}, line {bare.row}: no diameter_mm in this row. Give the nodule's diameter in mm.")
    series = _by_series(scans)
    known = [point for point in points if point.series in series]
    if not known:
        raise InputError(
            f"{table}: none of its {len({point.series for point in points})} series is among the {len(scans)} scans in "
            f"{folder}. A series is the scan's file name without suffix: {scans[0]['case']}, in the table "
            f"{points[0].series}."
        )
    others = Path(excluded).expanduser() if str(excluded) else folder / EXCLUDED
    ignored = _excluded(others, space) if str(excluded) or others.is_file() else []
    nodules, rest, patients = _of_scans(known, series), _of_scans(ignored, series), _patients(folder)
    return [
        {
            **scan,
            "patient": patients.get(scan["case"], scan["case"]),
            "points": [[*point.position, point.diameter] for point in nodules[scan["image"]]],
            "excluded": [[*point.position, point.diameter or 10.0] for point in rest[scan["image"]]],
            "rows": [f"{table}, line {point.row}" for point in nodules[scan["image"]]],
        }
        for scan in scans
    ]


def split_luna(
    cases: Sequence[Case], val_fraction: float = 0.1, seed: int = 0, val_subset: str = "", val_patients: Any = ()
) -> tuple[list[Case], list[Case]]:
    """Part scans into training and validation.

    Args:
        cases: of ``read_luna``.
        val_fraction: share of patients for validation.
        seed: of the random choice.
        val_subset: name of the folder whose scans are for validation, as in LUNA16's cross-validation (``subset9``);
            overrides the others.
        val_patients: the validation patients by name; overrides fraction and seed.

    Returns:
        Training scans, validation scans.

    Raises:
        InputError: unknown names, nothing is left to train on, or no nodule is.
    """
    if val_subset:
        chosen = [case for case in cases if Path(case["image"]).parent.name == val_subset]
        if not chosen or len(chosen) == len(cases):
            found = sorted({Path(case["image"]).parent.name for case in cases})
            raise InputError(
                f"val_subset={val_subset}: the scans' folders are {', '.join(found)}. Name one of several."
            )
        train, val = [case for case in cases if case not in chosen], chosen
    else:
        train, val = split_by_patient(cases, val_fraction, seed, val_patients)
    if not any(case["points"] for case in train):
        raise InputError(f"None of the {len(train)} scans for training has a nodule. Add scans, or change the split.")
    return train, val


class CheckPointsd(MapTransform):
    """Refuse annotated points outside their volume; pass others on unchanged.

    Args:
        keys: the image, a MetaTensor (1, X, Y, Z), as read.
    """

    def __init__(self, keys: KeysCollection, allow_missing_keys: bool = False) -> None:
        super().__init__(keys, allow_missing_keys)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        """Check the points of a case of ``read_luna``.

        Raises:
            InputError: a point is outside; names its row, the point, and where the volume is.
        """
        d: dict[Any, Any] = dict(data)
        for key in self.key_iterator(d):
            affine, shape = np.asarray(d[key].affine), np.array(d[key].shape[1:])
            inverse = np.linalg.inv(affine)
            for point, row in zip(d.get("points", []), d.get("rows", []), strict=True):
                voxel = nib.affines.apply_affine(inverse, point[:3])
                if np.any(voxel < -0.5) or np.any(voxel > shape - 0.5):
                    corners = nib.affines.apply_affine(affine, np.array(list(np.ndindex(2, 2, 2))) * (shape - 1))
                    low, high = _lps(corners).min(axis=0), _lps(corners).max(axis=0)
                    extent = ", ".join(f"{n} {a:.0f} to {b:.0f}" for n, a, b in zip("xyz", low, high, strict=True))
                    x, y, z = _lps(np.array([point[:3]]))[0]
                    raise InputError(
                        f"{row}: the point ({x:.1f}, {y:.1f}, {z:.1f}) mm (LPS) is outside of its scan {d['case']}, "
                        f"which has {extent}. Correct the row; if the table is in RAS, give --space RAS."
                    )
        return d


def _lps(points: np.ndarray) -> np.ndarray:
    return points * [-1, -1, 1]


def _by_series(scans: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """Image of each series, by its file's name and, of DICOM, by its UID."""
    images: dict[str, str] = {}
    for scan in scans:
        for name in {scan["case"], *([dicom.series_uid(Path(scan["image"]))] if Path(scan["image"]).is_dir() else [])}:
            if images.setdefault(name, scan["image"]) != scan["image"]:
                raise InputError(f"Two scans are called {name}: {images[name]} and {scan['image']}. Remove one.")
    return images


def _of_scans(points: Sequence[SeedPoint], series: Mapping[str, str]) -> dict[str, list[SeedPoint]]:
    found: dict[str, list[SeedPoint]] = defaultdict(list)
    for point in points:
        if point.series in series:
            found[series[point.series]].append(point)
    return found


def _excluded(path: Path, space: str) -> list[SeedPoint]:
    """LUNA16 writes -1 for a diameter that nobody measured, which ``read_points`` refuses."""
    rows = read_rows(path, ("seriesuid", "coordX", "coordY", "coordZ"))
    sign = -1.0 if space == "LPS" else 1.0
    points = []
    for line, row in enumerate(rows, start=2):
        try:
            x, y, z, size = (float(row.get(name) or -1) for name in ("coordX", "coordY", "coordZ", "diameter_mm"))
        except ValueError as error:
            raise InputError(f"{path}, line {line}: {error}. Coordinates and diameters are numbers of mm.") from error
        points.append(SeedPoint(line, row["seriesuid"], (sign * x, sign * y, z), size if size > 0 else None, ""))
    return points


def _patients(folder: Path) -> dict[str, str]:
    path = folder / PATIENTS
    if not path.is_file():
        return {}
    return {row["seriesuid"]: row["patient"] for row in read_rows(path, ("seriesuid", "patient"))}
