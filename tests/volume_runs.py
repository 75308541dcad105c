"""Running the volume-classification bundle on small volumes; shared by its tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.bundle import ConfigWorkflow

from med3d_nets import ClassificationNet
from tests.feature_runs import make_volume, write_labels, write_nifti
from tests.runner import Runner

__all__ = ["make_volume", "write_labels", "write_nifti"]

_RUNNER = Runner("volume_classification_resnet10")
BUNDLE = _RUNNER.folder
config = _RUNNER.config
run = _RUNNER.run
run_command = _RUNNER.run_command
SMALL: dict[str, Any] = {
    "spacing": [2.0, 2.0, 2.0],
    "input_size": [16, 16, 16],
    "max_epochs": 2,
    "num_workers": 0,
    "backbone_weights": "",
}


def train(data: Path, out: Path, **override: Any) -> ConfigWorkflow:
    """Run a small training from scratch."""
    return run("train", **{**SMALL, "dataset_dir": str(data), "output_dir": str(out)} | override)


def infer(scans: Path, out: Path, weights: Path | str, **override: Any) -> ConfigWorkflow:
    """Run inference."""
    return run("inference", **{"dataset_dir": str(scans), "output_dir": str(out), "weights": str(weights)} | override)


def blob_network() -> ClassificationNet:
    """A network of which one feature is the image's brightness every 8 voxels, the evidence for the second class."""
    net = ClassificationNet(10, 2).eval()
    with torch.no_grad():
        for name, value in net.named_parameters():
            value.fill_(1.0 if "bn" in name and name.endswith("weight") else 0.0)
        net.backbone.conv1.weight[0, 0, 3, 3, 3] = 1
        for layer in (net.backbone.layer2, net.backbone.layer3, net.backbone.layer4):
            layer[0].downsample[0].weight[0, 0] = 1
            layer[0].downsample[1].weight.fill_(1)
        net.head[2].weight[0, 0], net.head[2].weight[1, 0] = -1, 1
    return net


def save_classifier(
    folder: Path,
    network: torch.nn.Module,
    classes: Sequence[str],
    spacing: Sequence[float],
    input_size: Sequence[int],
    **more: Any,
) -> Path:
    """``model.pt`` and ``classifier.json`` as a training leaves them."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(network.state_dict(), folder / "model.pt")
    record = {"classes": list(classes), "spacing": list(spacing), "input_size": list(input_size), **more}
    (folder / "classifier.json").write_text(json.dumps(record))
    return folder / "model.pt"


def write_blobs(folder: Path, count: int, several: bool = False) -> Path:
    """Noise with a ball at the patient's left, the right, or with ``several`` also at both or nowhere; a table."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count):
        sides = [["left"], ["right"], ["left", "right"], []][index % (4 if several else 2)]
        voxels = rng.normal(0, 10, (18, 16, 14)) + 100
        for side in sides:
            start = 2 if side == "left" else 11
            voxels[start : start + 5, 5:11, 4:10] += 300
        write_nifti(folder / f"s{index}.nii.gz", voxels.astype(np.float32))
        rows.append((f"s{index}", "|".join(sides) or "none"))
    write_labels(folder / "labels.csv", rows)
    return folder
