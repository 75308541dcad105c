"""Fingerprint of a domain: what its volumes are like, measured once, and every fault of its files.

The median spacing is the working spacing of the domain (Chen, Ma, Zheng, arXiv 1904.00625, section 3.1); sizes,
intensities and class volumes tell its user whether the data are what they should be.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from monai.data import MetaTensor
from tqdm import tqdm

from med3d_nets.datalist import Case
from med3d_nets.errors import InputError
from med3d_nets.files import replacing
from med3d_nets.inputs import load_volume
from med3d_nets.manifest import Domain
from med3d_nets.transforms import check_label

Fingerprint = dict[str, Any]
_PERCENTILES = (0.5, 50.0, 99.5)
_MOST_FAULTS = 20


def fingerprints(domains: Sequence[Domain], folder: str | Path, quiet: bool = False) -> dict[str, Fingerprint]:
    """Measure every domain, or read what was measured before, and print the table.

    Args:
        domains: as ``read_manifest`` gives them.
        folder: folder of the cached fingerprints, ``NAME.json``; one whose files, classes or settings have changed
            is measured anew.
        quiet: print nothing.

    Returns:
        By domain: ``cases``, ``spacing_mm`` (median along right-left, anterior-posterior, inferior-superior),
        ``size_voxels`` (median at that spacing), ``intensity`` (median over the volumes of their 0.5, 50 and 99.5
        percentiles), ``class_volume_ml`` (median by class) and ``class_cases`` (cases that have it).

    Raises:
        InputError: lists every faulty file with its reason.
    """
    found, faults = {}, []
    for domain in domains:
        try:
            found[domain.name] = _cached(domain, Path(folder) / f"{domain.name}.json", quiet)
        except InputError as error:
            faults.append(str(error))
    if faults:
        raise InputError("Nothing was trained; mend these files or take them out:\n" + "\n".join(faults))
    if not quiet:
        print(table(found), flush=True)
    return found


def table(found: Mapping[str, Fingerprint]) -> str:
    """Fingerprints as a Markdown table."""
    lines = ["| domain | cases | spacing, mm | size, voxels | 0.5, 50, 99.5 % | classes, median mL |", "|" + "---|" * 6]
    for name, one in found.items():
        cells = [" × ".join(f"{v:g}" for v in one[key]) for key in ("spacing_mm", "size_voxels")]
        classes = ", ".join(f"{label} {volume:.3g}" for label, volume in one["class_volume_ml"].items())
        intensity = ", ".join(f"{v:.4g}" for v in one["intensity"])
        lines.append(f"| {name} | {one['cases']} | {cells[0]} | {cells[1]} | {intensity} | {classes} |")
    return "\n".join(lines)


def _cached(domain: Domain, path: Path, quiet: bool) -> Fingerprint:
    key = _key(domain)
    if path.is_file():
        try:
            before = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:  # what cannot be read is measured anew
            before = {}
        if before.get("key") == key:
            return before
    fingerprint = {"key": key, **_measure(domain, quiet)}
    with replacing(path) as hidden:
        hidden.write_text(f"{json.dumps(fingerprint, indent=2)}\n", encoding="utf-8")
    return fingerprint


def _key(domain: Domain) -> str:
    """Changes with the files (path, size, time of change) and with what the manifest says of their labels."""
    files = [Path(case[kind]) for case in domain.cases for kind in ("image", "label")]
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    meaning = [{k: list(v) for k, v in domain.classes.items()}, domain.background, domain.ignore, domain.allow_empty]
    return hashlib.sha256(json.dumps([stats, meaning]).encode()).hexdigest()


def _measure(domain: Domain, quiet: bool) -> Fingerprint:
    rows, faults = [], []
    for case in tqdm(domain.cases, desc=f"{domain.name}: fingerprint", disable=quiet or None):
        try:
            rows.append(_measure_case(domain, case))
        except InputError as error:
            faults.append(f"  {domain.name}: {error}")
    if faults:
        more = [f"  {domain.name}: and {len(faults) - _MOST_FAULTS} more"] if len(faults) > _MOST_FAULTS else []
        raise InputError("\n".join(faults[:_MOST_FAULTS] + more))
    spacing = np.median([row["spacing"] for row in rows], axis=0)
    sizes = np.array([row["extent"] for row in rows]) / spacing
    volumes = {name: [row["ml"][name] for row in rows if row["ml"][name] > 0] for name in domain.classes}
    return {
        "cases": len(rows),
        "modality": domain.modality,
        "spacing_mm": [round(float(v), 4) for v in spacing],
        "size_voxels": [max(1, round(float(v))) for v in np.median(sizes, axis=0)],
        "intensity": [round(float(v), 4) for v in np.median([row["intensity"] for row in rows], axis=0)],
        "class_volume_ml": {name: round(float(np.median(v)), 4) if v else 0.0 for name, v in volumes.items()},
        "class_cases": {name: len(v) for name, v in volumes.items()},
    }


def _measure_case(domain: Domain, case: Case) -> dict[str, Any]:
    image, label = load_volume(case["image"]), load_volume(case["label"])
    known = [v for values in (*domain.classes.values(), domain.background, domain.ignore) for v in values]
    check_label(label, image, {0, *known})
    spacing, extent = _along_patient(image)
    voxel_ml = float(np.prod(spacing)) / 1000
    values = label.numpy()
    ml = {name: float(np.isin(values, own).sum()) * voxel_ml for name, own in domain.classes.items()}
    if not any(ml.values()) and not domain.allow_empty:
        raise InputError(
            f"{case['label']}: has none of the classes {', '.join(domain.classes)}, all is background. Mend or leave "
            'out the case; where that is right, say "allow_empty": true for the domain.'
        )
    return {"spacing": spacing, "extent": extent, "intensity": np.percentile(image.numpy(), _PERCENTILES), "ml": ml}


def _along_patient(image: MetaTensor) -> tuple[np.ndarray, np.ndarray]:
    """Voxel size and extent in mm along right-left, anterior-posterior and inferior-superior."""
    affine = np.asarray(image.affine)
    order = np.argsort(nib.io_orientation(affine)[:, 0])
    sizes = nib.affines.voxel_sizes(affine)[order]
    return sizes, sizes * np.array(image.shape[1:])[order]
