"""Whether evaluation data may have been seen when weights were trained.

The check reads names: those of the dataset (``dataset.json`` and its folder) and those of the cases (``BRATS_001``,
``liver_12``, ``volume-12``). It cannot see scans that were renamed; "no sign" is no proof.
"""

from __future__ import annotations

import json
import logging
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from med3d_nets.datalist import lits_entries
from med3d_nets.errors import InputError
from med3d_nets.registry import WEIGHTS, Weight
from med3d_nets.weights.sources import SOURCES, Source, is_decathlon_alone
from med3d_nets.weights.states import file_sha256

VERDICTS = ("no sign", "unknown", "possible", "seen")
_MEANING = {
    "seen": "these scans were in the training of the weights: scores on them say nothing about new scans",
    "possible": "scans of the training may be among them: compare the sources before you report scores",
    "unknown": "it cannot be ruled out: report scores with that caveat, or use weights whose data is on record",
    "no sign": "neither the names of the data nor of the cases are those of the training",
}
Finding = tuple[str, str, tuple[str, ...]]
"""Verdict, reason, cases that look like training cases."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Overlap:
    """Result of the check; ``str()`` of it is for people.

    Attributes:
        weights: name of the weights.
        data: the dataset's file.
        verdict: ``"seen"``, ``"possible"``, ``"unknown"`` or ``"no sign"``.
        reasons: what was found, one sentence each.
        cases: names of the cases that look like training cases.
        checked: number of cases looked at.
    """

    weights: str
    data: str
    verdict: str
    reasons: tuple[str, ...]
    cases: tuple[str, ...]
    checked: int

    def __str__(self) -> str:
        lines = [f"{self.weights} on {self.data}: {self.verdict}; {_MEANING[self.verdict]}."]
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


def overlap(weights: str | Path, dataset_json: str | Path, section: str = "") -> Overlap:
    """Compare a dataset's names with those of the data that weights were trained on.

    Args:
        weights: name in the registry, or a file whose sha256 is in it.
        dataset_json: ``dataset.json`` of a folder in Medical Segmentation Decathlon layout, or the folder, or one of
            LiTS.
        section: list of cases to look at (``"test"``); empty: all lists.

    Returns:
        The verdict with its reasons.

    Raises:
        InputError: unknown weights, or no readable ``dataset.json``.
    """
    record = _record(weights)
    if record is None:
        raise InputError(
            f"{weights}: neither a name in the registry nor a file whose hash is in it, so its training data is not on "
            f"record. The names: {', '.join(WEIGHTS)}."
        )
    path = Path(dataset_json)
    path = path / "dataset.json" if path.is_dir() else path
    texts, cases = _read(path, section)
    sources = [source for source in SOURCES if any(map(source.is_meant, record.datasets))]
    findings = [_compare(source, texts, cases) for source in sources]
    if any(source.task for source in sources) and is_decathlon_alone(texts):
        findings.append(
            ("possible", "the data is the Decathlon, without saying which task; the training has seen some of them", ())
        )
    findings += _not_on_record(record, texts, cases)
    verdict = max((verdict for verdict, _, _ in findings), key=VERDICTS.index, default="no sign")
    seen = dict.fromkeys(case for _, _, found in findings for case in found)
    reasons = tuple(reason for _, reason, _ in findings if reason)
    return Overlap(record.name, str(path), verdict, reasons, tuple(seen), len(cases))


def warn_overlap(weights: str | Path, dataset_dir: str | Path, section: str = "") -> Overlap | None:
    """Log a warning when evaluation data may have been seen; one line in a config's ``initialize``.

    Args:
        weights: registry name or path; empty or a file that is not there (the loader reports it): nothing is done.
        dataset_dir: folder with ``dataset.json``, or that file, or a folder of LiTS.
        section: list of cases to look at; empty: all.

    Returns:
        The result, None where the weights' training data is not on record (for example of your own training).

    Raises:
        InputError: no readable ``dataset.json``.
    """
    record = _record(weights) if weights else None
    if record is None:
        if weights:
            _log.info("%s: not in the registry, so no check whether it has seen the data of %s.", weights, dataset_dir)
        return None
    result = overlap(record.name, dataset_dir, section)
    _log.log(logging.INFO if result.verdict == "no sign" else logging.WARNING, "%s", result)
    return result


def _record(weights: str | Path) -> Weight | None:
    """The registry's record, by name or by the file's hash."""
    path = Path(weights)
    if not path.is_file():
        return WEIGHTS.get(str(weights))
    digest = file_sha256(path)
    return next((record for record in WEIGHTS.values() if record.sha256 == digest), None)


def _not_on_record(record: Weight, texts: list[str], cases: list[str]) -> list[Finding]:
    """What no source describes, above all the unpublished list of the 23."""
    others = [entry for entry in record.datasets if not any(source.is_meant(entry) for source in SOURCES)]
    if not others:
        return []
    # The 8 datasets of the earlier release are the likeliest part of an unpublished list.
    alike = [s.title for s in SOURCES if s.task and _compare(s, texts, cases)[0] in ("seen", "possible")]
    alike += ["the Decathlon"] if is_decathlon_alone(texts) else []
    more = f"; the data look like {', '.join(alike)}, which the 8-dataset weights have seen" if alike else ""
    return [("unknown", f"trained on: {'; '.join(others)}{more}", ())]


def _compare(source: Source, texts: list[str], cases: list[str]) -> Finding:
    """Hold the data against one dataset of the training."""
    trained = tuple(case for case in cases if source.has_case(case))
    named = next(filter(source.is_named, texts), "")
    usual = next(filter(source.is_usual, texts), "")
    related = next(filter(source.is_related, texts), "")
    ids = f"{len(trained)} of {len(cases)} case names are of its form ({', '.join(trained[:3])})"
    if named and not trained and any(map(source.has_unlabelled_case, cases)):
        return "possible", f"{source.title}: named in '{named}'; the cases are of its part without public labels", ()
    if named:
        return "seen", f"{source.title}: named in '{named}'" + (f"; {ids}" if trained else ""), trained
    if trained and (source.own or usual):
        return "seen", f"{source.title}: {ids}" + (f", and the data is called '{usual}'" if usual else ""), trained
    if trained:
        return "possible", f"{source.title}: {ids}", trained
    if usual:
        return "possible", f"{source.title}: the data is called '{usual}'", ()
    if related:
        return "possible", f"{source.title}: shares scans with what '{related}' names", ()
    return "no sign", "", ()


def _read(path: Path, section: str) -> tuple[list[str], list[str]]:
    """Texts that may name the dataset (its folder's name among them), and the names of its cases."""
    lits = [] if path.is_file() else lits_entries(path.parent, section)
    if lits:
        return [path.resolve().parent.name], [_case(entry) for entry in lits]
    if not path.is_file():
        raise InputError(
            f"{path.parent}: no {path.name} in it. Give a folder in Medical Segmentation Decathlon layout."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error}). Mend or write it anew.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no object with name and lists of cases. Mend or write it anew.")
    lists = {key: value for key, value in content.items() if isinstance(value, list)}
    if section and not lists.get(section):
        raise InputError(f"{path}: has no list '{section}', or an empty one. Its lists: {', '.join(lists) or 'none'}.")
    cases = [_case(entry) for key, entries in lists.items() if section in ("", key) for entry in entries]
    texts = [str(content.get(key) or "") for key in ("name", "description", "reference")]
    return [text for text in [*texts, path.resolve().parent.name] if text], list(
        dict.fromkeys(case for case in cases if case)
    )


def _case(entry: Any) -> str:
    """File name without suffix, empty for an entry that names no image."""
    image = entry.get("image", "") if isinstance(entry, dict) else entry
    return re.sub(r"(\.nii)?\.[A-Za-z]\w*$", "", Path(image).name) if isinstance(image, str) else ""
