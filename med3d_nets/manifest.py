"""The domains of a co-training: a manifest of Decathlon-style folders.

    {"domains": [{"name": "liver_ct", "path": "Task03_Liver", "modality": "CT",
                  "classes": {"liver": [1, 2]}, "hold_out": 0.2}]}

Keys of a domain beside ``name`` and ``path``, its folder:

``modality``         for the record; taken from ``dataset.json`` where it is left out.
``classes``          name and label value of each class, several values to merge them; by default all labels of
                     ``dataset.json``.
``background``       values that become background.
``ignore``           values of which nothing is learnt, neither class nor background.
``weight``           factor of the domain's share of the batches, 1 by default.
``hold_out``         patients that are never trained on: a share (0.2) or a list of names; none by default.
``val_patients``     names of the patients for validation; drawn from the rest by default.
``patient_pattern``  regular expression whose first group is the patient in a file's name; each case by default.
``same_patient``     lists of cases that are one patient's where no pattern tells: ``[["scan_1", "scan_2"], …]``; the
                     patient has the name of the first.
``allow_empty``      true where a case without any class is no fault.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from med3d_nets.datalist import Case, read_datalist, split_by_patient
from med3d_nets.errors import InputError

_KEYS = {
    *("name", "path", "modality", "classes", "background", "ignore", "weight", "hold_out", "val_patients"),
    *("patient_pattern", "same_patient", "allow_empty"),
}


@dataclass(frozen=True)
class Domain:
    """One domain of a manifest, with its cases.

    Attributes:
        name: of the domain and of its branch.
        folder: Decathlon-style folder.
        modality: for example ``CT``.
        classes: label values of each class by its name, in the order of the class indices 1, 2, …
        background: label values beside 0 that are background.
        ignore: label values of which nothing is learnt.
        weight: factor of the domain's share of the batches.
        hold_out: share or names of the patients that are never trained on.
        val_patients: names of the patients for validation; empty: they are drawn.
        patient_pattern: of the patient in a file's name.
        same_patient: cases that are one patient's.
        allow_empty: a case without any class is no fault.
        cases: cases of the folder's ``training`` list, as ``read_datalist`` gives them.
    """

    name: str
    folder: Path
    modality: str
    classes: Mapping[str, tuple[int, ...]]
    background: tuple[int, ...] = ()
    ignore: tuple[int, ...] = ()
    weight: float = 1.0
    hold_out: float | tuple[str, ...] = 0.0
    val_patients: tuple[str, ...] = ()
    patient_pattern: str = ""
    same_patient: tuple[tuple[str, ...], ...] = ()
    allow_empty: bool = False
    cases: tuple[Case, ...] = field(default=(), repr=False)

    @property
    def num_classes(self) -> int:
        """Number of classes, background included."""
        return len(self.classes) + 1

    def training_cases(self) -> list[Case]:
        """Cases of the patients that are not held out."""
        return self._parts()[0]

    def held_out_cases(self) -> list[Case]:
        """Cases of the patients that are never trained on."""
        return self._parts()[1]

    def _parts(self) -> tuple[list[Case], list[Case]]:
        if isinstance(self.hold_out, tuple):
            return split_by_patient(self.cases, 0.0, val_patients=self.hold_out)
        return split_by_patient(self.cases, self.hold_out)


def read_manifest(path: str | Path, root: str | Path = "", leave_out: str | Sequence[str] = "") -> list[Domain]:
    """Read a manifest and the ``dataset.json`` of each of its folders.

    Args:
        path: the manifest, JSON.
        root: folder where relative paths in it start; the manifest's own by default.
        leave_out: name of a domain that is not to be trained on, or several with commas between them.

    Returns:
        The domains in the manifest's order.

    Raises:
        InputError: lists every fault: keys, names that come twice, folders without ``dataset.json`` (those of LiTS
            need none, but ``classes``), fewer than two cases, label values of which it is not told what they are.
    """
    path = Path(path)
    entries = _entries(path)
    names = [str(entry.get("name", "")) for entry in entries]
    faults = [f"the name {name!r} is given {n} times" for name, n in Counter(names).items() if n > 1]
    domains = []
    for entry in entries:
        try:
            domains.append(_domain(Path(root) if root else path.parent, entry))
        except InputError as error:
            faults.append(str(error))
    # a command line makes a list of what has commas
    out = {name.strip() for name in (leave_out.split(",") if isinstance(leave_out, str) else leave_out) if name.strip()}
    faults += [f"leave_out names {name!r}, which is no domain of it" for name in sorted(out - set(names))]
    if faults:
        raise InputError(f"{path}: mend these before a training can start:\n" + "\n".join(f"  {f}" for f in faults))
    kept = [domain for domain in domains if domain.name not in out]
    if not kept:
        raise InputError(f"{path}: leave_out leaves no domain.")
    return kept


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        raise InputError(
            f"{path}: no such manifest. Write one as docs/co-training.md shows, or let tools.decathlon do it."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}). Mend or write it anew.") from error
    entries = content.get("domains") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'{path}: needed is {{"domains": [{{"name": …, "path": …}}, …]}} with at least one domain.')
    return entries


def _domain(root: Path, entry: dict[str, Any]) -> Domain:
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z][\w-]*", name):
        raise InputError(f"domain {name!r}: a name starts with a letter and has letters, digits, _ and - alone.")
    if hasattr(nn.ModuleDict(), name):  # it holds the branches
        raise InputError(f"domain {name!r}: torch keeps this name for itself. Give another, {name}_ct for example.")
    unknown = sorted(set(entry) - _KEYS)
    if unknown:
        raise InputError(f"domain {name}: unknown keys {', '.join(unknown)}; allowed are {', '.join(sorted(_KEYS))}.")
    folder = root / str(entry.get("path", name))
    cases = read_datalist(folder, "training", str(entry.get("patient_pattern", "")))
    if len(cases) < 2:
        raise InputError(f"domain {name}: {folder} has one case; at least 2 are needed. Add cases or leave it out.")
    same_patient = _join_patients(name, cases, entry.get("same_patient", ()))
    path = folder / "dataset.json"
    index = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}  # LiTS has none
    meaning = _label_values(name, folder, entry, index)
    weight, given = entry.get("weight", 1.0), entry.get("hold_out", 0.0)
    if not isinstance(weight, int | float) or not weight > 0:
        raise InputError(f"domain {name}: weight={weight!r}; needed is a number above 0. To drop a domain: leave_out.")
    domain = Domain(
        name,
        folder,
        str(entry.get("modality") or _joined(index.get("modality"))),
        *meaning,
        float(weight),
        _hold_out(name, given, cases),
        tuple(map(str, entry.get("val_patients", ()))),
        str(entry.get("patient_pattern", "")),
        same_patient,
        bool(entry.get("allow_empty", False)),
        tuple(cases),
    )
    try:
        domain.training_cases()
    except InputError as error:
        raise InputError(f"domain {name}: hold_out={given!r} leaves no patient to train on. Hold fewer out.") from error
    return domain


def _joined(modality: Any) -> str:
    """``{"0": "CT"}`` of the Decathlon, or plain text."""
    return "/".join(map(str, modality.values() if isinstance(modality, dict) else [modality or ""])) or "unknown"


def _hold_out(name: str, given: Any, cases: Sequence[Case]) -> float | tuple[str, ...]:
    patients = sorted({case["patient"] for case in cases})
    if isinstance(given, list):
        unknown = sorted(set(map(str, given)) - set(patients))
        if unknown:
            raise InputError(f"domain {name}: hold_out {unknown} are not in the data. Patients: {', '.join(patients)}.")
        return tuple(map(str, given))
    if not isinstance(given, int | float) or not 0 <= given < 1:
        raise InputError(f"domain {name}: hold_out={given!r}; needed is a share, 0 to below 1, or a list of patients.")
    return float(given)


def _join_patients(name: str, cases: Sequence[Case], groups: Any) -> tuple[tuple[str, ...], ...]:
    """Give the cases of a group one patient, in place."""
    by_name = {case["case"]: case for case in cases}
    if not isinstance(groups, list | tuple) or not all(isinstance(group, list | tuple) and group for group in groups):
        raise InputError(f'domain {name}: same_patient={groups!r}; needed are lists of cases, [["scan_1", "scan_2"]].')
    named = Counter(str(case) for group in groups for case in group)
    faults = [f"{case} is no case" for case in named if case not in by_name]
    faults += [f"{case} comes {count} times" for case, count in named.items() if count > 1]
    if faults:
        raise InputError(f"domain {name}: same_patient: {'; '.join(faults)}. Name each case as its file, once.")
    for first, *others in groups:
        for case in others:
            by_name[case]["patient"] = by_name[first]["patient"]
    return tuple(tuple(map(str, group)) for group in groups)


Values = tuple[int, ...]


def _label_values(
    name: str, folder: Path, entry: Mapping[str, Any], index: Mapping[str, Any]
) -> tuple[dict[str, Values], Values, Values]:
    """Classes, background and ignored values of a domain."""
    labels = index.get("labels") or {}
    try:
        declared = {int(value): str(label) for value, label in labels.items() if int(value)}
    except (AttributeError, TypeError, ValueError):
        raise InputError(
            f'domain {name}: {folder}/dataset.json: labels are {labels!r}; needed are names by value, {{"1": "liver"}}.'
        ) from None
    background, ignore = _values(entry.get("background", ())), _values(entry.get("ignore", ()))
    left = {label: value for value, label in declared.items() if value not in (*background, *ignore)}
    given = entry.get("classes") or left
    if not isinstance(given, dict):
        raise InputError(f'domain {name}: classes={given!r}; needed are names with label values, {{"liver": [1, 2]}}.')
    classes = {str(label): _values(values) for label, values in given.items()}
    _check_values(name, folder, declared, classes, background, ignore)
    return classes, background, ignore


def _values(values: Any) -> tuple[int, ...]:
    try:
        return tuple(int(value) for value in (values if isinstance(values, list | tuple) else [values]))
    except (TypeError, ValueError):
        raise InputError(f"label values {values!r}: needed is an integer or a list of integers.") from None


def _check_values(
    name: str,
    folder: Path,
    declared: Mapping[int, str],
    classes: Mapping[str, tuple[int, ...]],
    background: tuple[int, ...],
    ignore: tuple[int, ...],
) -> None:
    """Every label value has one meaning."""
    if not classes:
        raise InputError(f"domain {name}: no class, neither in the manifest nor as labels in {folder}/dataset.json.")
    used = [value for values in (*classes.values(), background, ignore) for value in values]
    twice = sorted(value for value, count in Counter(used).items() if count > 1)
    if twice or 0 in [value for values in classes.values() for value in values]:
        wrong = f"the values {twice} have more than one meaning" if twice else "0 is background and no class"
        raise InputError(f"domain {name}: {wrong}. Name each label value once.")
    unnamed = [f"{value} ({declared[value]})" for value in sorted(set(declared) - set(used))]
    if unnamed:
        raise InputError(
            f"domain {name}: the label {', '.join(unnamed)} of {folder}/dataset.json is in none of classes, background "
            "and ignore. Name it in one of them; ignore leaves it out of the training."
        )
