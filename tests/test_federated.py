"""Every training bundle, unmodified, as two clients of a federation: MONAI's MonaiAlgo, their weights averaged."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems
from monai.fl.utils.exchange_object import ExchangeObject

from tests import (
    feature_runs,
    nodule_runs,
    nodule_scans,
    small_domains,
    small_training,
    test_detection_bundle,
    test_liver_bundle,
    volume_runs,
)

BUNDLES = Path(__file__).parents[1] / "bundles"
Options = dict[str, Any]

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:DenseASPP")]


def lungs(folder: Path, seed: int) -> Options:
    return {**small_training.SMALL, "dataset_dir": str(small_training.write_dataset(folder))}


def livers(folder: Path, seed: int) -> Options:
    for number in range(3):
        for name, voxels in zip(("volume", "segmentation"), test_liver_bundle.body(seed + number), strict=True):
            test_liver_bundle.write(folder / f"{name}-{number}.nii", voxels)
    return {**test_liver_bundle.SMALL, **test_liver_bundle.TRAINING, "dataset_dir": str(folder)}


def domains(folder: Path, seed: int) -> Options:
    folder.mkdir()
    small_domains.write_manifest(folder)
    return {**small_domains.SMALL, "dataset_dir": str(folder)}


def labels(folder: Path, seed: int) -> Options:
    encoder = feature_runs.write_encoder(folder.parent / "encoder.pth")
    return {
        **feature_runs.SMALL,
        "device": "cpu",
        "dataset_dir": str(feature_runs.write_dataset(folder)),
        "backbone_weights": str(encoder),
    }


def volumes(folder: Path, seed: int) -> Options:
    data = volume_runs.write_blobs(folder, 12)
    return {**volume_runs.SMALL, "device": "cpu", "dataset_dir": str(data), "val_patients": ["s0", "s1"]}


def nodules(folder: Path, seed: int) -> Options:
    small = {"input_size": [24, 24, 16], "spacing": [1.5, 1.5, 1.5], "norm_batches": 2, "batch_size": 4}
    data = str(nodule_runs.many_nodules(folder))
    return {**small, "device": "cpu", "num_workers": 0, "backbone_weights": "", "folds": 2, "dataset_dir": data}


def scans(folder: Path, seed: int) -> Options:
    data = str(nodule_scans.luna_folder(folder, (2, 1)))
    return {**test_detection_bundle.SMALL, **test_detection_bundle.TRAINING, "dataset_dir": data}


TASKS: dict[str, Callable[[Path, int], Options]] = {
    "lung_ct_segmentation_resnet10": lungs,
    "liver_ct_segmentation_resnet10": livers,
    "med3d_multidomain_segmentation_resnet10": domains,
    "med3d_feature_extraction_resnet10": labels,
    "volume_classification_resnet10": volumes,
    "lung_nodule_ct_classification_resnet10": nodules,
    "lung_nodule_ct_detection_resnet10": scans,
}


def client(root: Path, task: str, number: int, evaluate: str) -> MonaiAlgo:
    options = TASKS[task](root.parent / f"data{number}", 10 * number)
    options = {**options, "output_dir": str(root.parent / f"out{number}")}
    options.pop("bundle_root", None)
    algo = MonaiAlgo(
        str(root), train_kwargs=options, eval_kwargs=dict(options), config_evaluate_filename=evaluate, local_epochs=1
    )
    algo.initialize({ExtraItems.CLIENT_NAME: f"client{number}"})
    return algo


@pytest.mark.parametrize("task", TASKS)
def test_two_clients(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both train from the same weights, and evaluate the average of what they learnt."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    root = shutil.copytree(BUNDLES / task, tmp_path / "bundle", ignore=shutil.ignore_patterns("model.pt"))
    clients = [client(root, task, number, "configs/train.json") for number in range(2)]
    weights = {key: value.clone() for key, value in clients[0].trainer.network.state_dict().items()}
    for _ in range(2):
        learnt = []
        for one in clients:
            one.train(ExchangeObject(weights=weights), {})
            learnt.append(one.get_weights({}).weights)
        assert all(set(one) == set(weights) for one in learnt)
        moved = [sum(float(change.float().abs().sum()) for change in one.values()) for one in learnt]
        assert min(moved) > 0 and moved[0] != moved[1]
        weights = {key: value + (learnt[0][key] + learnt[1][key]) / 2 for key, value in weights.items()}
        for one in clients:
            metrics = one.evaluate(ExchangeObject(weights=weights), {}).metrics
            assert metrics and all(0 <= float(torch.as_tensor(value).mean()) <= 1.01 for value in metrics.values())
            own = one.evaluator.network.state_dict()
            floats = [key for key, value in own.items() if value.is_floating_point()]  # counts of batches are rounded
            assert all(torch.allclose(own[key], weights[key]) for key in floats)
