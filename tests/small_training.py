"""A training small enough for tests: synthetic chests of a few thousand voxels, and the bundle's own configs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigWorkflow
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from med3d_nets.errors import InputError

ROOT = Path(__file__).parents[1]
BUNDLE = ROOT / "bundles" / "lung_ct_segmentation_resnet10"
SHAPE = (48, 36, 32)
SPACING = 6.0  # mm

SMALL: dict[str, Any] = {
    "bundle_root": str(BUNDLE),
    "device": "cpu",
    "spacing": [SPACING] * 3,
    "patch_size": [32, 32, 16],
    "val_window": [32, 32, 32],
    "samples_per_epoch": 4,
    "max_epochs": 2,
    "val_interval": 1,
    "norm_batches": 2,
    "num_workers": 0,
    "val_patients": ["chest0"],
}


def make_chest(seed: int, shape: Sequence[int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """A body with two lungs, boxes of random size, as HU (int16) and labels (uint8); x grows to the right."""
    rng = np.random.default_rng(seed)
    x, y, z = (np.abs(np.linspace(-1, 1, n)) for n in shape)
    side = np.linspace(-1, 1, shape[0])[:, None, None]
    body = (x < 0.92)[:, None, None] & (y < 0.85)[:, None] & (z < 2)
    height, depth, width = rng.uniform(0.6, 0.9), rng.uniform(0.5, 0.7), rng.uniform(0.6, 0.8)
    lungs = ((x > 0.15) & (x < width))[:, None, None] & (y < depth)[:, None] & (z < height)
    image = np.where(lungs, -850, np.where(body, 40, -1000)) + rng.normal(0, 20, shape)
    return image.astype(np.int16), np.where(lungs, np.where(side < 0, 1, 2), 0).astype(np.uint8)


def write_dataset(folder: Path, count: int = 3, section: str = "training") -> Path:
    """Write ``chest0`` … with labels as a Decathlon-style folder."""
    entries = []
    for index in range(count):
        entry = {"image": f"images/chest{index}.nii.gz", "label": f"labels/chest{index}.nii.gz"}
        for path, voxels in zip(entry.values(), make_chest(index), strict=True):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            nib.save(nib.Nifti1Image(voxels, np.diag([SPACING, SPACING, SPACING, 1])), folder / path)
        entries.append(entry)
    (folder / "dataset.json").write_text(json.dumps({section: entries}))
    return folder


def config(name: str) -> str:
    """Path of one of the bundle's configs."""
    return str(BUNDLE / "configs" / f"{name}.json")


def small(**override: Any) -> dict[str, Any]:
    """Settings of train.json for a training of seconds."""
    return {**SMALL, **override}


def run_config(name: str, on_iteration: Callable[[Engine], None] | None = None, **override: Any) -> ConfigWorkflow:
    """Run a config of the bundle in this process, as ``python -m monai.bundle run`` does.

    ``on_iteration`` is called after each step of the training.
    """
    workflow = ConfigWorkflow(config(name), logging_file=False, workflow_type=None, **override)
    hook = sys.excepthook
    try:
        workflow.initialize()
        if on_iteration:
            trainer = workflow.parser.get_parsed_content("train#trainer")
            trainer.add_event_handler(Events.ITERATION_COMPLETED, on_iteration)
        workflow.run()
        workflow.finalize()
    finally:
        sys.excepthook = hook
    return workflow


def train(data: Path, out: Path, **override: Any) -> ConfigWorkflow:
    """Run the small training."""
    return run_config("train", **small(dataset_dir=str(data), output_dir=str(out), **override))


def parse(item: str, **override: Any) -> Any:
    """Build one item of train.json, without its ``initialize``."""
    workflow = ConfigWorkflow(config("train"), logging_file=False, workflow_type=None, **small(**override))
    workflow.parser.parse(reset=True)
    return workflow.parser.get_parsed_content(item)


def refusal(run: Callable[[], Any]) -> str:
    """Message of the InputError that a run ends with, which MONAI may have wrapped."""
    with pytest.raises(Exception) as caught:  # the type is checked below
        run()
    error: BaseException | None = caught.value
    while error is not None and not isinstance(error, InputError):
        error = error.__cause__ or error.__context__
    assert isinstance(error, InputError), caught.value
    return str(error)


def scalars(out: Path, tag: str) -> dict[int, float]:
    """By step; of several event files the last that has a step."""
    found = {}
    for path in sorted(out.glob("events.out.tfevents*"), key=lambda p: p.stat().st_mtime):
        events = EventAccumulator(str(path)).Reload()
        if tag in events.Tags()["scalars"]:
            found.update({event.step: event.value for event in events.Scalars(tag)})
    return found


def losses(out: Path) -> dict[int, float]:
    """Loss of each step of a training."""
    return scalars(out, "train_loss")


def assert_same(one: Any, other: Any, where: str = "") -> None:
    """Equality to the last bit of nested states."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, (first, second) in enumerate(zip(one, other, strict=True)):
            assert_same(first, second, f"{where}/{index}")
    else:
        assert one == other, where
