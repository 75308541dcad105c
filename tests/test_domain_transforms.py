"""Transforms of the co-training."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from monai.data import MetaTensor
from monai.transforms import ClassesToIndices

from med3d_nets import ClassIndexd, DomainSpacingd, InputError, LeaveOutUnknownd, RandPatchd
from med3d_nets.multidomain import UNKNOWN


def item(label: Any, **more: Any) -> dict[str, Any]:
    label = torch.as_tensor(label, dtype=torch.float32)[None]
    image = torch.arange(label.numel(), dtype=torch.float32).reshape(label.shape) + 1
    meta = {"filename_or_obj": "x.nii.gz"}
    return {"image": MetaTensor(image, meta=meta), "label": MetaTensor(label, meta=meta), **more}


def test_values_become_indices() -> None:
    label = np.array([0, 1, 2, 3, 7, 9]).reshape(6, 1, 1)
    data = item(label, values=[[2], [1, 3]], background=[7], ignore=[9])
    out = ClassIndexd("label")(data)["label"]
    assert out.dtype == torch.uint8 and out.flatten().tolist() == [0, 2, 1, 2, 0, UNKNOWN]
    with pytest.raises(InputError, match=r"x\.nii\.gz: label values .*; allowed are 0, 1, 2, 9"):
        ClassIndexd("label")(item(label, values=[[2], [1]], background=[], ignore=[9]))


def test_unknown_voxels_count_in_no_score() -> None:
    data = {"pred": torch.tensor([1, 1, 0, 2]), "label": torch.tensor([1, UNKNOWN, UNKNOWN, 0])}
    out = LeaveOutUnknownd(["pred", "label"])(data)
    assert out["pred"].tolist() == [1, 0, 0, 2] and out["label"].tolist() == [1, 0, 0, 0]


def test_spacing_is_that_of_the_item() -> None:
    data = item(np.zeros((10, 12, 6)), spacing=[2.0, 1.0, 0.5])
    data["label"] = data["label"].to(torch.uint8)
    out = DomainSpacingd(["image", "label"])(data)
    assert out["image"].shape == out["label"].shape == (1, 6, 12, 11) and out["label"].dtype == torch.uint8
    np.testing.assert_allclose(np.diag(out["image"].affine)[:3], [2.0, 1.0, 0.5])


def patch_of(label: np.ndarray, size: list[int], seed: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    data = item(label, patch_size=size)
    data["label"] = data["label"].to(torch.uint8)
    data["label_cls_indices"] = ClassesToIndices(num_classes=3)(data["label"])
    out = RandPatchd(["image", "label"], **options).set_random_state(seed)(data)
    return out["image"], out["label"]


@pytest.mark.parametrize("seed", range(4))
def test_a_patch_is_a_part_of_the_volume(seed: int) -> None:
    label = np.zeros((20, 18, 16), dtype=np.uint8)
    label[2:5, 3:6, 9:14] = 1
    image, patch = patch_of(label, [8, 6, 16], seed, prob=0.0)
    start = np.unravel_index(int(image.flatten()[0]) - 1, label.shape)
    place = tuple(slice(int(a), int(a) + n) for a, n in zip(start, (8, 6, 16), strict=True))
    whole = item(label)["image"][0]
    assert torch.equal(image[0], whole[place].as_tensor()) and torch.equal(patch[0], torch.as_tensor(label[place]))


def test_what_is_beyond_the_volume_is_unknown() -> None:
    label = np.ones((6, 10, 8), dtype=np.uint8)
    image, patch = patch_of(label, [10, 6, 8], 0, prob=0.0)
    assert patch.shape == (1, 10, 6, 8)
    outside = [0, 1, 8, 9]
    assert (patch[:, outside] == UNKNOWN).all() and (image[:, outside] == 0).all()
    assert (patch[:, 2:8] == 1).all() and (image[:, 2:8] > 0).all()


def test_turning_keeps_image_and_label_together() -> None:
    label = np.zeros((24, 24, 24), dtype=np.uint8)
    label[8:16, 8:16, 8:16] = 1
    data = item(label, patch_size=[24, 24, 24])
    data["image"] = MetaTensor(torch.as_tensor(label, dtype=torch.float32)[None])
    data["label_cls_indices"] = ClassesToIndices(num_classes=2)(data["label"])
    out = RandPatchd(["image", "label"], prob=1.0, rotate=0.5).set_random_state(1)(data)
    known = out["label"] != UNKNOWN
    agree = (out["image"][known] > 0.5) == (out["label"][known] == 1)
    assert agree.float().mean() > 0.99 and not torch.equal(out["label"], torch.as_tensor(label)[None])
    assert set(out["label"].unique().tolist()) == {0, 1, UNKNOWN}


@pytest.mark.parametrize(("classes", "expected"), [(2, 1 / 2), (3, 1 / 3)])
def test_every_class_is_as_likely(classes: int, expected: float) -> None:
    label = np.zeros((40, 40, 40), dtype=np.uint8)
    label[20, 20, 20] = 1
    if classes == 3:
        label[30, 5:9, 5] = 2
    hits = sum(int((patch_of(label, [5, 5, 5], seed, prob=0.0)[1] == 1).any()) for seed in range(200))
    assert hits / 200 == pytest.approx(expected, abs=0.1)
