"""Dataset folders, of the Decathlon or of LiTS, and patient-level splits."""

from __future__ import annotations

import json
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from med3d_nets.errors import InputError

Case = dict[str, Any]


def read_datalist(dataset_dir: str | Path, section: str = "training", patient_pattern: str = "") -> list[Case]:
    """Read one section of a folder's ``dataset.json`` (Medical Segmentation Decathlon layout), or a folder of LiTS.

    The latter has no ``dataset.json``, but ``volume-N.nii`` and ``segmentation-N.nii`` (also .nii.gz) anywhere in it:
    its section ``training``.

    Args:
        dataset_dir: folder with ``dataset.json``, or of LiTS.
        section: list to read; entries are ``{"image": …, "label": …}`` with paths relative to the folder, and
            optionally ``"patient"`` (for splits) and ``"weight"`` (for sampling).
        patient_pattern: regular expression whose first group, found in the image's file name without suffix, is
            the patient; used for entries without ``"patient"``. Empty: every case is a patient of its own.

    Returns:
        Cases with absolute ``image`` and ``label`` paths, ``case`` (file name without suffix, or path where that
        is not unique), ``patient``, ``weight``.

    Raises:
        InputError: no folder, no or broken ``dataset.json``, no such section, a file that is not there or is listed
            twice, a volume of LiTS without segmentation, or a file name without patient.
    """
    path = Path(dataset_dir) / "dataset.json"
    entries: list[Any] = []
    if not path.is_file():
        entries = lits_entries(Path(dataset_dir), section)
    if not path.is_file() and not entries:
        raise InputError(
            f"{dataset_dir}: no dataset.json in it, nor volume-N.nii of LiTS. Give a folder in Medical Segmentation "
            "Decathlon layout."
        )
    entries = entries or _read_section(path, section)
    cases = [_case(path, entry) for entry in entries]
    for case, name in zip(cases, _unique_names(path, cases), strict=True):
        case["case"] = name
        case["patient"] = str(case["patient"]) if "patient" in case else _patient(case, patient_pattern)
    return cases


def split_by_patient(
    cases: Sequence[Case], val_fraction: float = 0.2, seed: int = 0, val_patients: str | Sequence[str] = ()
) -> tuple[list[Case], list[Case]]:
    """Part cases into training and validation so that no patient is in both.

    Args:
        cases: cases of ``read_datalist``.
        val_fraction: share of patients for validation, 0 to below 1; at least one patient unless it is 0.
        seed: of the random choice of patients.
        val_patients: the validation patients by name, or one name; overrides fraction and seed.

    Returns:
        Training cases, validation cases; each in the order given.

    Raises:
        InputError: unknown patients, or nothing is left to train on.
    """
    patients = sorted({case["patient"] for case in cases})
    if val_patients:
        chosen = {val_patients} if isinstance(val_patients, str) else {str(patient) for patient in val_patients}
        unknown = sorted(chosen - set(patients))
        if unknown:
            raise InputError(f"val_patients {unknown} are not in the data. Its patients: {', '.join(patients)}.")
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


def lits_entries(folder: Path, section: str = "training") -> list[Case]:
    """Find the volumes and segmentations of LiTS; its batches may lie in folders of their own.

    Args:
        folder: searched whole for ``volume-N.nii`` and ``segmentation-N.nii``, also .nii.gz.
        section: ``training``, for LiTS has public labels of that alone; empty is the same.

    Returns:
        Entries as in ``dataset.json``, by number; none where there is no such volume.

    Raises:
        InputError: another section, a number that is there twice, or a volume without segmentation.
    """
    found: dict[str, dict[int, str]] = {"volume": {}, "segmentation": {}}
    for path in sorted(folder.rglob("*.nii*")):
        match = re.fullmatch(r"(volume|segmentation)-(\d+)\.nii(\.gz)?", path.name)
        if match:
            name, number = path.relative_to(folder).as_posix(), int(match[2])
            other = found[match[1]].setdefault(number, name)
            if other != name:
                raise InputError(f"{folder}: {match[1]} {number} is there twice, {other} and {name}. Remove one.")
    volumes, segmentations = found.values()
    if volumes and section not in ("", "training"):
        raise InputError(f"{folder}: a folder of LiTS has the section training alone, not '{section}'.")
    lacking = sorted(volumes.keys() - segmentations.keys())
    if lacking:
        raise InputError(f"{folder}: no segmentation-{lacking[0]}.nii for {volumes[lacking[0]]}. Add it, or move both.")
    return [{"image": volumes[number], "label": segmentations[number]} for number in sorted(volumes)]


def _read_section(path: Path, section: str) -> list[Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}). Mend or write it anew.") from error
    entries = content.get(section) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        lists = [key for key, value in content.items() if isinstance(value, list)] if isinstance(content, dict) else []
        raise InputError(f"{path}: has no list '{section}', or an empty one. Its lists: {', '.join(lists) or 'none'}.")
    return entries


def _case(path: Path, entry: Any) -> Case:
    case: Case = {"weight": 1.0, **entry} if isinstance(entry, dict) else {}
    for key in ("image", "label"):
        if not isinstance(case.get(key), str):
            raise InputError(
                f'{path}: the entry {entry!r} names no {key}; needed is {{"image": "PATH", "label": "PATH"}}.'
            )
        file = (path.parent / case[key]).resolve()
        if not file.exists():
            raise InputError(f"{path}: names {case[key]}, but there is no such file.")
        case[key] = str(file)
    return case


def _unique_names(path: Path, cases: Sequence[Case]) -> list[str]:
    """File names without suffix; of equal ones the path in the folder, since scores and patients go by name."""
    twice = [image for image, count in Counter(case["image"] for case in cases).items() if count > 1]
    if twice:
        raise InputError(
            f"{path}: lists {', '.join(twice[:3])} more than once. Use 'weight' to show a case more often."
        )
    paths = [Path(os.path.relpath(_stem(Path(case["image"])), path.parent.resolve())) for case in cases]
    uses = Counter(one.name for one in paths)
    return [one.name if uses[one.name] == 1 else one.as_posix() for one in paths]


def _stem(image: Path) -> Path:
    """The path without suffix; folders, of a DICOM series, have none."""
    return image if image.is_dir() else image.with_name(re.sub(r"(\.nii)?\.\w+$", "", image.name))


def _patient(case: Case, pattern: str) -> str:
    if not pattern:
        return str(case["case"])
    name = _stem(Path(case["image"])).name
    try:
        match = re.search(pattern, name)
        if match:
            return match.group(1)
    except (re.error, IndexError) as error:
        raise InputError(f"patient_pattern={pattern!r}: is not a pattern with one group ({error}).") from error
    raise InputError(f"{case['image']}: patient_pattern={pattern!r} finds no patient in the name '{name}'.")
