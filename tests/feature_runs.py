"""Running the feature-extraction bundle on small volumes; shared by its tests."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigWorkflow
from numpy.typing import NDArray

from med3d_nets.resnet import Med3DResNet
from tests.runner import Runner

_RUNNER = Runner("med3d_feature_extraction_resnet10")
BUNDLE = _RUNNER.folder
config = _RUNNER.config
run = _RUNNER.run
run_command = _RUNNER.run_command
SIZE = (24, 22, 20)
CLASSES = ("smooth", "rough")
SMALL: dict[str, Any] = {
    "spacing": [2.0, 2.0, 2.0],
    "input_size": [16, 16, 16],
    "max_epochs": 2,
    "num_workers": 0,
    "val_patients": ["smooth0", "rough0"],
}


def train(data: Path, out: Path, encoder: Path | str, **override: Any) -> ConfigWorkflow:
    """Run a small training."""
    return run(
        "train",
        **{**SMALL, "dataset_dir": str(data), "output_dir": str(out), "backbone_weights": str(encoder)} | override,
    )


def write_encoder(path: Path, depth: int = 10, seed: int = 3) -> Path:
    """Random weights in the form of the release: ``{"state_dict": {"module.conv1.weight": …}}``."""
    torch.manual_seed(seed)
    backbone = Med3DResNet(depth)
    for name, buffer in backbone.named_buffers():
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            buffer.normal_(std=0.1)
    torch.save({"state_dict": {f"module.{key}": value for key, value in backbone.state_dict().items()}}, path)
    return path


def make_volume(kind: str, seed: int, shape: Sequence[int] = SIZE) -> NDArray[np.float32]:
    """A ball with soft borders, or noise of one voxel's width, on a grey ground."""
    rng = np.random.default_rng(seed)
    axes = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    centre = rng.uniform(-0.2, 0.2, 3)
    distance = np.sqrt(sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)))
    ball = np.clip(1.2 - distance, 0, 1) * rng.uniform(150, 250)
    noise = rng.normal(0, 8 if kind == "smooth" else 120, tuple(shape))
    return (100 + ball + noise).astype(np.float32)


def write_nifti(path: Path, voxels: NDArray[Any], affine: NDArray[Any] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.0, 1.0]) if affine is None else affine), path)
    return path


def write_labels(path: Path, rows: Sequence[Sequence[Any]], columns: Sequence[str] = ("case", "label")) -> Path:
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([columns, *rows])
    return path


def write_dataset(folder: Path, count: int = 4) -> Path:
    """``smooth0.nii.gz``, ``rough0.nii.gz`` and so on, of unequal sizes, with ``labels.csv``."""
    rows = []
    for kind in CLASSES:
        for index in range(count):
            shape = [n - 2 * index for n in SIZE]
            write_nifti(folder / f"{kind}{index}.nii.gz", make_volume(kind, len(rows), shape))
            rows.append((f"{kind}{index}", kind))
    write_labels(folder / "labels.csv", rows)
    return folder


def read_table(path: Path) -> dict[str, dict[str, str]]:
    """Rows of a CSV by ``case``."""
    with path.open(newline="") as stream:
        return {row["case"]: row for row in csv.DictReader(stream)}
