"""Small crops of nodules and the nodule bundle's runs; shared by its tests."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from tests.runner import Runner

_RUNNER = Runner("lung_nodule_ct_classification_resnet10")
BUNDLE = _RUNNER.folder
run = _RUNNER.run
COLUMNS = ("patient_id", "nodule_id", "Diagnosis", "Malignancy_value", "diameter_mm")


def write_nodules(folder: Path, rows: Sequence[Sequence[Any]], columns: Sequence[str] = COLUMNS) -> Path:
    """``metadata.csv`` and a crop for each row: a ball of the row's diameter in lung, slices of 2.5 mm."""
    (folder / "imagesTr").mkdir(parents=True, exist_ok=True)
    with (folder / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    for index, row in enumerate(rows):
        diameter = float(row[4]) if str(row[4]).replace(".", "").isdigit() else 6.0
        shape = (30, 32, max(2, round(diameter / 2.5)))
        place = [(np.arange(n) - (n - 1) / 2) * s for n, s in zip(shape, (0.7, 0.7, 2.5), strict=True)]
        distance = np.sqrt(sum(axis**2 for axis in np.meshgrid(*place, indexing="ij")))
        noise = np.random.default_rng(index).normal(0, 20, shape)
        voxels = np.where(distance < diameter / 2, 40, -860) + noise
        image = nib.Nifti1Image(voxels.astype(np.float32), np.diag([-0.7, -0.7, 2.5, 1.0]))
        nib.save(image, folder / "imagesTr" / f"{row[0]}_R_{row[1]}.nii.gz")
    return folder


def many_nodules(folder: Path, patients: int = 12) -> Path:
    """Small balls are benign, large ones malignant, by both rules."""
    rows = [
        (f"p{number:02d}", 1, "Malign" if number % 2 else "Benign", 5 if number % 2 else 2, 16 if number % 2 else 5)
        for number in range(patients)
    ]
    return write_nodules(folder, rows)
