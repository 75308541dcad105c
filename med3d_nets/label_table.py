"""Labels of whole volumes from a CSV table, and splits by patient that keep the classes' shares."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from med3d_nets.datalist import Case, split_by_patient
from med3d_nets.errors import InputError
from med3d_nets.inputs import VOLUME_SUFFIXES, find_cases
from med3d_nets.label_sets import check_classes, classes_of, has_several, indicator, joined, members
from med3d_nets.tables import Row, read_rows

SECTIONS = ("training", "validation", "test", "none")


def read_labels(
    labels: str | Path,
    dataset_dir: str | Path,
    classes: Sequence[Any] = (),
    patient_pattern: str = "",
    multi_label: bool = False,
) -> list[Case]:
    """Read a table of labels and find the volume of each row.

    Args:
        labels: CSV file (UTF-8) with a header. Columns: ``case``, the name that ``find_cases`` gives a volume, or a
            path relative to ``dataset_dir``; ``label``, text or an integer; optionally ``patient`` and ``split``
            (training, validation, test, none). Other columns are ignored.
        dataset_dir: folder of the volumes. Where cases are given by name, each volume in it needs a row; ``none`` in
            ``split`` leaves one out.
        classes: the classes in order; empty: all labels found, sorted, as numbers if all are.
        patient_pattern: regular expression whose first group, found in the case's name, is the patient; used without
            a column ``patient``. Empty: every case is a patient of its own.
        multi_label: a volume may have several classes: a label is their names parted by ``|``, or ``none``.

    Returns:
        ``image`` (path), ``case`` (name, unique), ``label`` (index of the class; with ``multi_label`` one number per
        class, 1 where the case has it, float32), ``class`` (its name; with ``multi_label`` the names in the classes'
        order, parted by ``|``, or ``none``), ``patient``, ``split`` (empty without that column), in the table's order.

    Raises:
        InputError: the table cannot be read or lacks a column; a row has no label, an unknown case, class or split, or
            a case for the second time; a volume has no row; or a name has no patient.
    """
    path = Path(labels).expanduser()
    rows = read_rows(path, ("case", "label"))
    twice = [name for name, count in Counter(row["case"] for row in rows).items() if count > 1]
    if twice:
        raise InputError(f"{path}: {', '.join(twice[:5])}: more than one row for a case. Keep one.")
    images = _images(path, rows, Path(dataset_dir).expanduser())
    used = [(row, image) for row, image in zip(rows, images, strict=True) if row.get("split") != "none"]
    names = [str(name) for name in classes] or class_names(
        name for row, _ in used for name in (members(row["label"]) if multi_label else [row["label"]])
    )
    if multi_label:
        check_classes(names)
    cases = []
    for row, image in used:
        where = f"{path}, case {row['case']}"
        label = indicator(where, row["label"], names) if multi_label else _index(where, row["label"], names)
        if row.get("split", "") not in ("", *SECTIONS):
            raise InputError(f"{where}: unknown split '{row['split']}'. Allowed: {', '.join(SECTIONS)}.")
        patient = row.get("patient") or _patient(where, row["case"], patient_pattern)
        name = joined([one for one in names if one in members(row["label"])]) if multi_label else row["label"]
        case = {"image": image, "case": row["case"], "label": label, "class": name}
        cases.append({**case, "patient": patient, "split": row.get("split", "")})
    return cases


def class_names(labels: Any) -> list[str]:
    """The different labels in order, as numbers if all are integers."""
    found = sorted({str(label) for label in labels})
    return sorted(found, key=int) if all(re.fullmatch(r"[+-]?\d+", name) for name in found) else found


def known_classes(cases: Sequence[Case]) -> list[str]:
    """Names of the classes of ``read_labels``, by index, when no ``classes`` were given."""
    return class_names(name for case in cases for name in classes_of(case).values())


def split_cases(
    cases: Sequence[Case],
    num_classes: int,
    val_fraction: float = 0.2,
    seed: int = 0,
    val_patients: str | Sequence[str] = (),
) -> tuple[list[Case], list[Case]]:
    """Part cases into training and validation so that no patient is in both and each class is in both.

    Where the table has a column ``split``, that decides (cases with an empty cell are for training). Otherwise patients
    are drawn as in ``split_by_patient``, class by class; a patient counts for the class of its first case (of several
    labels: for the set of them; sets of one patient each are drawn from together). Cases of the test are left out.

    Args:
        cases: of ``read_labels``.
        num_classes: number of classes.
        val_fraction: share of patients for validation, 0 to below 1.
        seed: of the random choice of patients.
        val_patients: the validation patients by name; overrides fraction and seed.

    Returns:
        Training cases, validation cases; each in the order given.

    Raises:
        InputError: fewer than two classes; a patient on both sides or also in the test; unknown patients; or a class
            that training or validation lacks, or that every case of it has.
    """
    if num_classes < 2:
        raise InputError(f"The labels have {num_classes} class; at least two are needed to tell apart.")
    sections = _sections(cases)
    cases = [case for case in cases if case["split"] != "test"]
    if any(case["split"] for case in cases):
        train = [case for case in cases if case["split"] != "validation"]
        val = [case for case in cases if case["split"] == "validation"]
    elif val_patients:
        train, val = split_by_patient(cases, val_fraction, seed, val_patients)
    else:
        train, val = _split_each_class(cases, val_fraction, seed)
    mixed = [patient for patient, parts in sections.items() if len(parts) > 1]
    if mixed:
        raise InputError(
            f"Patients in more than one split: {', '.join(mixed[:5])} ({len(mixed)} in all). Their volumes would be "
            "known before they are tested; give each patient one split."
        )
    for name, part in (("training", train), ("validation", val)):
        if part:
            _check_part(name, part, cases, num_classes)
    if not train:
        raise InputError("No case is for training: the column 'split' gives all to validation or test.")
    return train, val


def cases_to_classify(
    dataset_dir: str | Path,
    labels: str | Path = "",
    classes: Sequence[str] = (),
    section: str = "test",
    multi_label: bool = False,
) -> list[Case]:
    """Cases for the evaluation of a classifier.

    Args:
        dataset_dir: volumes, see ``find_cases``.
        labels: table of labels; empty: all volumes, without labels.
        classes: the classifier's classes.
        section: split to take where the table has a column ``split``; otherwise all cases are taken.
        multi_label: see ``read_labels``.

    Returns:
        As ``read_labels``, or as ``find_cases`` without labels.

    Raises:
        InputError: see these, or the table has no case of that split.
    """
    if not str(labels):
        return [dict(case) for case in find_cases(dataset_dir)]
    cases = read_labels(labels, dataset_dir, classes, multi_label=multi_label)
    if any(case["split"] for case in cases):
        found = sorted({case["split"] or "none given" for case in cases})
        cases = [case for case in cases if case["split"] == section]
        if not cases:
            raise InputError(f"{labels}: no case of the split '{section}'. There are: {', '.join(found)}.")
    return cases


def sample_weights(cases: Sequence[Case], balance: str = "sampling") -> list[float]:
    """How often each case is drawn: with ``balance="sampling"`` all classes alike, otherwise all cases alike.

    Of several labels, having a class and not having it are the two classes of which each case is one; a case's weight
    is the mean over them.
    """
    _check_balance(balance)
    if balance != "sampling":
        return [1.0] * len(cases)
    kinds = [_kinds(case) for case in cases]
    counts = Counter(kind for own in kinds for kind in own)
    return [sum(1.0 / counts[kind] for kind in own) / len(own) for own in kinds]


def class_weights(cases: Sequence[Case], num_classes: int, balance: str = "sampling") -> list[float]:
    """Weight of each class in the loss: with ``balance="loss"`` inverse to its share, mean 1 over cases; else 1.

    Of several labels, ``balance="loss"`` is the weight of having a class over not having it: the share of cases without
    it over that of those with it.
    """
    _check_balance(balance)
    counts = Counter(index for case in cases for index in classes_of(case))
    if balance != "loss":
        return [1.0] * num_classes
    if any(has_several(case) for case in cases):
        return [(len(cases) - counts[index]) / counts[index] for index in range(num_classes)]
    return [len(cases) / (num_classes * counts[index]) for index in range(num_classes)]


def _check_balance(balance: str) -> None:
    if balance not in ("sampling", "loss", "none"):
        raise InputError(f"balance={balance!r}: allowed are sampling, loss and none.")


def _index(where: str, label: str, names: Sequence[str]) -> int:
    if label not in names:
        raise InputError(f"{where}: unknown label '{label}'. The classes: {', '.join(names)}.")
    return names.index(label)


def _kinds(case: Case) -> list[tuple[int, bool]]:
    """The class of a case; of several labels, for each class whether it has it."""
    if has_several(case):
        return [(index, bool(value)) for index, value in enumerate(case["label"])]
    return [(case["label"], True)]


def _check_part(name: str, part: Sequence[Case], cases: Sequence[Case], num_classes: int) -> None:
    """Refuse a part of the cases in which a class has nothing to be told apart from, or is not at all."""
    known = {index: one for case in cases for index, one in classes_of(case).items()}
    counts = Counter(index for case in part for index in classes_of(case))
    missing = [index for index in range(num_classes) if not counts[index]]
    constant = [index for index in range(num_classes) if counts[index] == len(part)]
    if missing or constant:
        absent = ", ".join(str(known.get(index, f"number {index}")) for index in missing or constant)
        words = f"No case of class {absent} is for {name}" if missing else f"Every case for {name} is of class {absent}"
        raise InputError(
            f"{words}. Add patients, or choose by val_patients, seed or a column 'split'; val_fraction 0 trains "
            "without validation."
        )


def _images(path: Path, rows: Sequence[Row], dataset_dir: Path) -> list[str]:
    """Path of each row's volume."""
    by_path = [_is_path(row["case"]) for row in rows]
    known = {} if all(by_path) else {case["case"]: case["image"] for case in find_cases(dataset_dir)}
    images = []
    for number, (row, is_path) in enumerate(zip(rows, by_path, strict=True), start=2):
        image = str((dataset_dir / row["case"]).resolve()) if is_path else known.get(row["case"], "")
        if not image or not Path(image).exists():
            some = f" Its cases: {', '.join(list(known)[:5])} …" if known else ""
            raise InputError(f"{path}, line {number}: there is no case '{row['case']}' in {dataset_dir}.{some}")
        images.append(image)
    twice = [image for image, count in Counter(images).items() if count > 1]
    if twice:
        raise InputError(f"{path}: names {', '.join(twice[:3])} more than once. Keep one row.")
    listed = {str(Path(image).resolve()) for image in images}
    missing = [name for name, image in known.items() if str(Path(image).resolve()) not in listed]
    if missing:
        raise InputError(
            f"{path}: no label for {', '.join(missing[:5])} ({len(missing)} of {len(known)} volumes in {dataset_dir}). "
            "Add rows; 'none' in a column 'split' leaves a case out."
        )
    return images


def _is_path(case: str) -> bool:
    return "/" in case or case.lower().endswith(VOLUME_SUFFIXES)


def _patient(where: str, name: str, pattern: str) -> str:
    if not pattern:
        return name
    try:
        match = re.search(pattern, name)
        if match:
            return str(match.group(1))
    except (re.error, IndexError) as error:
        raise InputError(f"patient_pattern={pattern!r}: is not a pattern with one group ({error}).") from error
    raise InputError(f"{where}: patient_pattern={pattern!r} finds no patient in '{name}'.")


def _sections(cases: Sequence[Case]) -> Mapping[str, set[str]]:
    """The splits of each patient; no cell counts as training."""
    sections: dict[str, set[str]] = {}
    for case in cases:
        sections.setdefault(case["patient"], set()).add(case["split"] or "training")
    return sections


def _split_each_class(cases: Sequence[Case], val_fraction: float, seed: int) -> tuple[list[Case], list[Case]]:
    classes: dict[str, tuple[int, ...]] = {}
    for case in cases:
        classes.setdefault(case["patient"], tuple(classes_of(case)))
    if any(has_several(case) for case in cases):  # rare sets together: one patient's set says no more than another's
        counts = Counter(classes.values())
        classes = {patient: own if counts[own] > 1 else (-1,) for patient, own in classes.items()}
    chosen: set[str] = set()
    for label in sorted(set(classes.values())):
        group = [case for case in cases if classes[case["patient"]] == label]
        if len({case["patient"] for case in group}) > 1:  # a class of one patient can only be trained on
            chosen |= {case["patient"] for case in split_by_patient(group, val_fraction, seed)[1]}
    train = [case for case in cases if case["patient"] not in chosen]
    return train, [case for case in cases if case["patient"] in chosen]
