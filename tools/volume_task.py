"""A small real task for the bundle ``volume_classification``: is a hippocampus small or large?

``python -m tools.volume_task make --data DATA --out DIR`` writes the table of labels of a folder in Medical
Segmentation Decathlon layout (Task04, hippocampus), whose masks give the volumes; the classifier sees the image alone.

The Decathlon does not tell its patients. In the 200 cases that this was tried on, the volumes of numbers 2n - 1 and 2n
correlate by 0.90 and those of 2n and 2n + 1 by -0.07: the former are taken for the two sides of one person, and never
parted.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import fire
import nibabel as nib
import numpy as np
from numpy.typing import NDArray

from med3d_nets.datalist import read_datalist
from med3d_nets.errors import InputError, clear_errors
from med3d_nets.files import replacing
from med3d_nets.label_sets import joined
from med3d_nets.tables import csv_text

PARTS = {1: "anterior", 2: "posterior"}  # label values
SPLITS = ("test", "training", "training", "validation", "test", "training", "training", "training")  # in turns
FEWEST = 32  # cases


def make(data: str, out: str, multi_label: bool = False) -> None:
    """Write ``labels.csv``: of each volume its class and its split.

    A hippocampus is ``large`` if anterior and posterior part together have more than the median of the training cases,
    else ``small``. With several labels: ``large_anterior`` and ``large_posterior``, each part by its own median. The
    splits go in turns over the patients in the order of their numbers, so that they are the same everywhere.

    Args:
        data: folder with ``dataset.json``, images and labels.
        out: folder of the table; images are not copied.
        multi_label: the task with several labels per volume.

    Raises:
        InputError: see ``read_datalist``; or there are too few cases, or a name has no number.
    """
    cases = sorted(read_datalist(data), key=lambda case: Path(case["image"]).name)
    if len(cases) < FEWEST:
        raise InputError(f"{data}: has {len(cases)} cases with a label, needed are at least {FEWEST}.")
    patients = [_patient(case) for case in cases]
    order = {patient: number for number, patient in enumerate(sorted(set(patients)))}
    splits = [SPLITS[order[patient] % len(SPLITS)] for patient in patients]
    volumes = np.array([_volumes(case["label"]) for case in cases])
    training = volumes[[split == "training" for split in splits]]
    if multi_label:
        large = volumes > np.median(training, axis=0)
        labels = [
            joined([f"large_{name}" for name, is_it in zip(PARTS.values(), row, strict=True) if is_it]) for row in large
        ]
    else:
        large = volumes.sum(axis=1) > np.median(training.sum(axis=1))
        labels = ["large" if is_it else "small" for is_it in large]
    rows = zip(cases, labels, patients, splits, volumes, strict=True)
    path = Path(out) / "labels.csv"
    with replacing(path) as hidden:
        hidden.write_text(_table(rows), encoding="utf-8")
    counts = ", ".join(f"{splits.count(name)} {name}" for name in sorted(set(splits)))
    print(f"{len(cases)} cases ({counts}) -> {path}")


def _patient(case: Any) -> str:
    """Two numbers in a row, the first odd, are one person."""
    found = re.search(r"(\d+)\.nii", Path(case["image"]).name)
    if not found:
        raise InputError(f"{case['image']}: has no number at its end, for example hippocampus_001.nii.gz.")
    return f"p{(int(found[1]) + 1) // 2:03d}"


def _volumes(label: str) -> list[float]:
    """Volume of each part in mL."""
    image: Any = nib.load(label)
    values: NDArray[Any] = np.asarray(image.dataobj)
    voxel = abs(np.linalg.det(image.affine[:3, :3])) / 1000
    return [float((values == value).sum() * voxel) for value in PARTS]


def _table(rows: Any) -> str:
    lines = []
    for case, label, patient, split, volumes in rows:
        name = Path(case["image"]).name.removesuffix(".gz").removesuffix(".nii")
        lines.append([name, label, patient, split, *(f"{volume:.3f}" for volume in volumes)])
    return csv_text(["case", "label", "patient", "split", *(f"{name}_ml" for name in PARTS.values())], lines)


if __name__ == "__main__":
    clear_errors()
    fire.Fire({"make": make})
