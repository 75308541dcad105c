"""Decathlon-style dataset folders and patient-level splits."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from med3d_nets.errors import InputError

Case = dict[str, Any]


def read_datalist(dataset_dir: str | Path, section: str = "training", patient_pattern: str = "") -> list[Case]:
    """Read one section of a folder's ``dataset.json`` (Medical Segmentation Decathlon layout).

    Args:
        dataset_dir: folder with ``dataset.json``.
        section: list to read; entries are ``{"image": …, "label": …}`` with paths relative to the folder, and
            optionally ``"patient"`` (for splits) and ``"weight"`` (for sampling).
        patient_pattern: regular expression whose first group in the image's file name is the patient; used for
            entries without ``"patient"``. Empty: every case is a patient of its own.

    Returns:
        Cases with absolute ``image`` and ``label`` paths, ``case`` (file name without suffix), ``patient``, ``weight``.

    Raises:
        InputError: no folder, no or broken ``dataset.json``, no such section, or a file that is not there.
    """
    path = Path(dataset_dir) / "dataset.json"
    if not path.is_file():
        raise InputError(f"{dataset_dir}: no dataset.json in it. A folder in Medical Segmentation Decathlon layout is needed.")
    try:
        entries = json.loads(path.read_text())[section]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise InputError(f"{path}: no list '{section}' can be read from it ({error!r}).") from error
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path}: the list '{section}' is empty.")
    return [_case(path, entry, patient_pattern) for entry in entries]


def split_by_patient(
    cases: Sequence[Case], val_fraction: float = 0.2, seed: int = 0, val_patients: Sequence[str] = ()
) -> tuple[list[Case], list[Case]]:
    """Part cases into training and validation so that no patient is in both.

    Args:
        cases: cases of ``read_datalist``.
        val_fraction: share of patients for validation, 0 to below 1; at least one patient unless it is 0.
        seed: of the random choice of patients.
        val_patients: the validation patients by name; overrides fraction and seed.

    Returns:
        Training cases, validation cases; each in the order given.

    Raises:
        InputError: unknown patients, or nothing is left to train on.
    """
    patients = sorted({case["patient"] for case in cases})
    if val_patients:
        unknown = sorted(set(val_patients) - set(patients))
        if unknown:
            raise InputError(f"val_patients {unknown} are not in the data. Its patients: {', '.join(patients)}.")
        chosen = set(val_patients)
    else:
        if not 0 <= val_fraction < 1:
            raise InputError(f"val_fraction={val_fraction}: allowed is 0 to below 1.")
        count = max(1, round(val_fraction * len(patients))) if val_fraction > 0 else 0
        chosen = set(random.Random(seed).sample(patients, count))
    train = [case for case in cases if case["patient"] not in chosen]
    val = [case for case in cases if case["patient"] in chosen]
    if not train:
        raise InputError(f"All {len(patients)} patients went into validation; lower val_fraction or add data.")
    return train, val


def _case(path: Path, entry: Any, patient_pattern: str) -> Case:
    if not isinstance(entry, dict) or "image" not in entry:
        raise InputError(f"{path}: entry {entry!r} has no 'image'.")
    case: Case = {"weight": 1.0, **entry}
    for key in ("image", "label"):
        if key in entry:
            file = (path.parent / entry[key]).resolve()
            if not file.exists():
                raise InputError(f"{path} names {entry[key]}, but there is no such file.")
            case[key] = str(file)
    name = Path(case["image"]).name.split(".")[0]
    case["case"] = name
    if "patient" not in entry:
        match = re.search(patient_pattern, name) if patient_pattern else None
        case["patient"] = match.group(1) if match else name
    return case
