"""Benign or malignant nodules of LIDC-IDRI, by two rules, and patient-level folds.

The table is the ``metadata.csv`` beside the crops: one row per nodule with the radiologists' rating of malignancy, 1 to
5, the diagnosis that its maker derived, the diameter, and where the nodule is in the scan.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from med3d_nets.datalist import Case, split_by_patient
from med3d_nets.errors import InputError
from med3d_nets.inputs import find_cases
from med3d_nets.seed_points import cases_at_points, read_points
from med3d_nets.tables import Row, read_rows

Rule = Callable[[str, Row], float]


def _diagnosis(where: str, row: Row) -> float:
    if row["Diagnosis"] not in ("Benign", "Malign"):
        raise InputError(f"{where}: Diagnosis is {row['Diagnosis']!r}; allowed are Benign and Malign.")
    return float(row["Diagnosis"] == "Malign")


def _rating(where: str, row: Row) -> float:
    if row["Malignancy_value"] not in ("1", "2", "3", "4", "5"):
        raise InputError(f"{where}: Malignancy_value is {row['Malignancy_value']!r}; allowed are 1 to 5.")
    return float(int(row["Malignancy_value"]) >= 4)


# Target: column of the table, and what of it is malignant. `rating_4_5` is Med3D's rule (arXiv 1904.00625, section 4).
TARGETS: dict[str, tuple[str, Rule]] = {
    "malign": ("Diagnosis", _diagnosis),
    "rating_4_5": ("Malignancy_value", _rating),
}


def read_nodules(
    dataset_dir: str | Path,
    metadata: str | Path = "",
    targets: Sequence[str] = tuple(TARGETS),
    scans: bool = False,
    space: str = "LPS",
) -> list[Case]:
    """Read the table of nodules and find the image of each.

    Args:
        dataset_dir: folder of the crops ``PATIENT_R_NODULE.nii.gz``, or whose ``imagesTr`` has them; with ``scans``
            folder of whole scans.
        metadata: the table; empty: ``metadata.csv`` in the folder. Columns ``patient_id`` and ``nodule_id``, those of
            the targets (``Diagnosis``, ``Malignancy_value``), optionally ``diameter_mm``; with ``scans`` those of
            ``read_points`` too.
        targets: what is to be told: ``malign``, by the table's diagnosis; ``rating_4_5``, by Med3D's rule: ratings 1
            to 3 are benign, 4 and 5 malignant.
        scans: the images are whole scans, and the nodules points in them.
        space: of the points' coordinates, ``LPS`` or ``RAS``.

    Returns:
        ``image``, ``case`` (``PATIENT_R_NODULE``), ``patient``, ``label`` (list of 0.0 or 1.0, one per target),
        ``diameter`` (mm, or None); with ``scans`` ``point`` (mm, RAS) and ``where`` too.

    Raises:
        InputError: no or an unknown target; the table cannot be read or lacks a column; a row has another value, no
            image, or names a nodule for the second time; or a crop has no row.
    """
    _check_targets(targets)
    folder = Path(dataset_dir).expanduser()
    path = Path(metadata).expanduser() if str(metadata) else folder / "metadata.csv"
    rows = read_rows(path, ("patient_id", "nodule_id", *(TARGETS[name][0] for name in targets)))
    names = [f"{row['patient_id']}_R_{row['nodule_id']}" for row in rows]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {', '.join(twice[:5])}: more than one row for a nodule. Keep one.")
    images = _scans(path, names, folder, space) if scans else _crops(path, names, folder)
    cases = []
    for line, (row, name) in enumerate(zip(rows, names, strict=True), start=2):
        label = [TARGETS[target][1](f"{path}, line {line}", row) for target in targets]
        diameter = _diameter(f"{path}, line {line}", row)
        cases.append({**images[name], "patient": row["patient_id"], "label": label, "diameter": diameter})
    return cases


def split_nodules(
    cases: Sequence[Case], fold: int = 0, folds: int = 5, hold_out: float = 0.2, seed: int = 0
) -> tuple[list[Case], list[Case], list[Case]]:
    """Part nodules by patient into training, validation and test.

    Args:
        cases: of ``read_nodules``.
        fold: which of the folds is for validation, from 0.
        folds: number of parts of the patients that are not held out, at least 2.
        hold_out: share of patients for the test, the same for all folds; by default those whose nodules the
            project's co-training does not see either (``tools/manifests/real8.json``). 0: none.
        seed: of the folds.

    Returns:
        Training, validation and test cases; each in the order given.

    Raises:
        InputError: no such fold, or fewer patients than folds.
    """
    if folds < 2 or not 0 <= fold < folds:
        raise InputError(f"fold={fold} of folds={folds}: needed are at least 2 folds, and one of 0 to {folds - 1}.")
    pool, test = split_by_patient(cases, hold_out) if hold_out else (list(cases), [])
    patients = sorted({case["patient"] for case in pool})
    if len(patients) < folds:
        raise InputError(f"{len(patients)} patients besides those held out: too few for {folds} folds.")
    random.Random(seed).shuffle(patients)
    chosen = set(patients[fold::folds])
    train = [case for case in pool if case["patient"] not in chosen]
    return train, [case for case in pool if case["patient"] in chosen], test


def unseen(cases: Sequence[Case], record: dict[str, Any]) -> list[Case]:
    """Cases of the patients that a classifier has seen neither in training nor in validation.

    Args:
        cases: of ``read_nodules``.
        record: of ``read_record``; its ``patients`` are those seen.

    Raises:
        InputError: all have been seen, so that no score would mean anything.
    """
    seen = set(record.get("patients", ()))
    left = [case for case in cases if case["patient"] not in seen]
    if not left:
        raise InputError(f"All {len(cases)} nodules are of patients that the classifier was trained on. Add others.")
    return left


def positive_weights(cases: Sequence[Case]) -> list[float]:
    """Weight of the malignant nodules in the loss of each target: benign ones over malignant ones.

    Raises:
        InputError: a target has one class only.
    """
    counts = [sum(column) for column in zip(*(case["label"] for case in cases), strict=True)]
    if not counts or any(count in (0, len(cases)) for count in counts):
        raise InputError(f"Of {len(cases)} nodules for training, malignant are {counts}: each rule needs both kinds.")
    return [(len(cases) - count) / count for count in counts]


def _check_targets(targets: Sequence[str]) -> None:
    unknown = [str(name) for name in targets if name not in TARGETS]
    if unknown or not targets or isinstance(targets, str):
        raise InputError(f"targets={targets!r}: needed is a list of one or more of {', '.join(TARGETS)}.")


def _crops(path: Path, names: Sequence[str], folder: Path) -> dict[str, dict[str, Any]]:
    """Image and name of each crop."""
    inner = folder / "imagesTr"
    known = {case["case"]: dict(case) for case in find_cases(inner if inner.is_dir() else folder)}
    for line, name in enumerate(names, start=2):
        if name not in known:
            raise InputError(f"{path}, line {line}: there is no crop '{name}' in {folder}. Remove the row or add it.")
    listed = set(names)
    missing = [name for name in known if name not in listed]
    if missing:
        raise InputError(f"{path}: no row for {', '.join(missing[:5])} ({len(missing)} crops in all). Add rows.")
    return known


def _scans(path: Path, names: Sequence[str], folder: Path, space: str) -> dict[str, dict[str, Any]]:
    """Image, point and name of each nodule in a scan."""
    points = read_points(path, space)
    by_line = {f"{path}, line {point.row}": name for point, name in zip(points, names, strict=True)}
    cases = cases_at_points(points, folder, path)
    return {by_line[case["where"]]: {**case, "case": by_line[case["where"]]} for case in cases}


def _diameter(where: str, row: Row) -> float | None:
    if not row.get("diameter_mm"):
        return None
    try:
        return float(row["diameter_mm"])
    except ValueError as error:
        raise InputError(f"{where}: diameter_mm is {row['diameter_mm']!r}; needed is a number.") from error
