"""Small domains for the tests of the co-training: bright balls, and boxes with a second class in them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "med3d_multidomain_segmentation_resnet10"
METADATA = str(BUNDLE / "configs" / "metadata.json")

SMALL: dict[str, Any] = {
    "bundle_root": str(BUNDLE),
    "device": "cpu",
    "patch_size": [32, 32, 16],
    "val_window": [32, 32, 32],
    "batch_size": 2,
    "batches_per_epoch": 4,
    "max_epochs": 2,
    "val_interval": 1,
    "norm_batches": 2,
    "num_workers": 0,
    "val_fraction": 0.3,
    "min_val_patients": 3,
    "head_width": 8,
}


def make_case(seed: int, classes: int, shape: Sequence[int] = (32, 28, 20)) -> tuple[np.ndarray, np.ndarray]:
    """Noise with one bright structure (ball), or two (a box, brighter in its half)."""
    rng = np.random.default_rng(seed)
    grid = np.indices(shape).astype(float)
    centre = [rng.uniform(0.4, 0.6) * n for n in shape]
    distance = [abs(axis - c) for axis, c in zip(grid, centre, strict=True)]
    label = np.zeros(shape, dtype=np.uint8)
    if classes == 1:
        label[sum(d**2 for d in distance) < 36] = 1
    else:
        label[np.maximum.reduce(distance) < 6] = 1
        label[(label == 1) & (grid[0] > centre[0])] = 2
    return (rng.normal(0, 5, shape) + 100 + 60.0 * label).astype(np.float32), label


def write_domain(folder: Path, count: int, classes: int = 1, spacing: Sequence[float] = (1.0, 1.0, 2.0)) -> Path:
    """Write a Decathlon-style folder."""
    entries = []
    for number in range(count):
        entry = {"image": f"imagesTr/case{number}.nii.gz", "label": f"labelsTr/case{number}.nii.gz"}
        for path, voxels in zip(entry.values(), make_case(number, classes), strict=True):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([*spacing, 1.0])), folder / path)
        entries.append(entry)
    names = {"0": "background", "1": "ball"} if classes == 1 else {"0": "background", "1": "near", "2": "far"}
    index = {"modality": {"0": "MRI"}, "labels": names, "training": entries}
    (folder / "dataset.json").write_text(json.dumps(index))
    return folder


def write_manifest(folder: Path, *entries: dict[str, Any]) -> Path:
    """Write a manifest; without entries, two domains that are made: four balls, five boxes."""
    if not entries:
        write_domain(folder / "balls", 4)
        write_domain(folder / "boxes", 5, classes=2, spacing=(1.2, 1.2, 1.2))
        entries = ({"name": "balls"}, {"name": "boxes", "hold_out": 0.2})
    path = folder / "manifest.json"
    path.write_text(json.dumps({"domains": entries}))
    return path


def config(name: str) -> str:
    """Path of one of the bundle's configs."""
    return str(BUNDLE / "configs" / f"{name}.json")


def small(**override: Any) -> dict[str, Any]:
    """Settings of train.json for a training of seconds."""
    return {**SMALL, **override}
